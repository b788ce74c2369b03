//! What must hold for any bytes from a broker: checked by a fuzz target and by the tests.

#![allow(clippy::unwrap_used)] // a failure is what is looked for

use super::wire::decode;
use super::{Error, Files};
use crate::protocol::{self, Acquire, GetFds, Method};

/// No reply makes the decoder panic; what it has understood means the same when it is sent again,
/// and a list of open files that did not come is an error.
pub fn reply(data: &[u8]) {
    macro_rules! check_all {
        ($($interface:literal $method:ident -> $reply:ty: $($rule:ident)*;)*) => {
            $(check::<protocol::$method>(data);)*
        };
    }
    protocol::with_methods!(check_all);
    for reply in [
        decode::<Acquire>(data).map(|(reply, _)| reply.fds),
        decode::<GetFds>(data).map(|(reply, _)| reply.fds),
    ] {
        let Ok(fds) = reply else { continue };
        assert_eq!(Files::pair("", &fds, Vec::new()).is_ok(), fds.is_empty());
    }
}

fn check<M>(data: &[u8])
where
    M: Method,
    M::Reply: PartialEq + std::fmt::Debug,
{
    match decode::<M>(data) {
        Ok((reply, continues)) => {
            let frame = protocol::Reply { parameters: reply, continues };
            let bytes = serde_json::to_vec(&frame).unwrap();
            let again = decode::<M>(&bytes).unwrap();
            assert_eq!(again, (frame.parameters, continues));
        }
        Err(Error::Broker { error, advice }) => {
            let bytes = serde_json::to_vec(&error.to_json(advice.as_deref())).unwrap();
            let again = match decode::<M>(&bytes) {
                Err(Error::Broker { error, advice }) => Some((error, advice)),
                _ => None,
            };
            assert_eq!(again, Some((error, advice)));
        }
        Err(error) => {
            assert!(matches!(error, Error::Unknown { .. } | Error::Malformed { .. }), "{error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Replies that a broker sends, to be spoilt.
    const REPLIES: [&str; 6] = [
        r#"{"parameters":{"lease":"l","key":"k","tenant":"t","backend":"type1","handout":"group",
           "iommu":"type1v2","container":"c","devices":["d"],"fds":[{"index":0,"kind":"lease",
           "name":""}]}}"#,
        r#"{"parameters":{"fds":[]},"continues":true}"#,
        r#"{"parameters":{"groups":[{"id":1,"viable":true,"state":"free","blockers":[],
           "devices":[{"bdf":"b","vendor":"8086","device":"10d3","class":"020000"}]}]}}"#,
        r#"{"error":"org.vfiobroker.Broker.Busy","parameters":{"device":"d","since":1}}"#,
        r#"{"error":"org.varlink.service.ExpectedMore"}"#,
        r#"{"parameters":{"leases":[{"lease":"l","vm":"v","tenant":"t","uid":1,"pid":2,
           "backend":"type1","handout":"devices","container":"c","devices":[],"withheld":[],
           "mappings":null,"mapped_bytes":3,"since":4}]}}"#,
    ];

    proptest! {
        #[test]
        fn no_bytes_upset_the_decoder(data in proptest::collection::vec(any::<u8>(), 0..200)) {
            reply(&data);
        }

        #[test]
        fn no_spoilt_reply_upsets_the_decoder(
            which in 0..REPLIES.len(),
            at in any::<prop::sample::Index>(),
            with in proptest::collection::vec(any::<u8>(), 0..4),
            gone in 0..8usize,
        ) {
            let mut data = REPLIES[which].as_bytes().to_vec();
            reply(&data);
            let from = at.index(data.len());
            let to = (from + gone).min(data.len());
            data.splice(from..to, with);
            reply(&data);
        }
    }
}
