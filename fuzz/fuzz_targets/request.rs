//! See `vfio_broker::protocol::properties::request`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vfio_broker::protocol::properties::request(data));
