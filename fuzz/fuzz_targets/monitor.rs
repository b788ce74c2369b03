//! See `vfio_broker::qmp::properties::monitor`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vfio_broker::qmp::properties::monitor(data));
