//! See `vfio_broker::client::properties::reply`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vfio_broker::client::properties::reply(data));
