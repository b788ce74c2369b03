//! What must hold for any bytes from a peer: checked by the fuzz targets and, on random bytes of
//! some form, by the tests.

#![allow(clippy::unwrap_used)] // a failure is what is looked for

use super::{Call, Error, Frames, MAX_MESSAGE, Request};

/// Cutting a stream into messages gives what splitting it at its NUL bytes gives, whatever the
/// pieces it comes in and however often it is asked; a message that is too long ends it.
///
/// `data` is a list of pieces: a byte that says what the piece is and its length, then its bytes.
pub fn framing(data: &[u8]) {
    let mut frames = Frames::default();
    let mut stream = Vec::new();
    let mut got: Vec<Vec<u8>> = Vec::new();
    let mut rest = data;
    while let [kind, tail @ ..] = rest {
        let len = usize::from(kind >> 2);
        let (piece, tail) = tail.split_at(len.min(tail.len()));
        rest = tail;
        // Some pieces are long, so that the limit is met.
        let piece = if kind & 1 == 0 { piece.to_vec() } else { piece.repeat(700) };
        frames.push(&piece);
        stream.extend_from_slice(&piece);
        let mut asked = 0;
        // Some times only one message is taken, and the rest waits for the next piece.
        while asked == 0 || kind & 2 == 0 {
            asked += 1;
            match frames.next_message() {
                Ok(Some(message)) => got.push(message.to_vec()),
                Ok(None) => break,
                Err(_) => {
                    assert!(frames.next_message().is_err(), "it went on after an oversize");
                    assert!(stream.len() >= MAX_MESSAGE);
                    break;
                }
            }
        }
    }
    let oversize = loop {
        match frames.next_message() {
            Ok(Some(message)) => got.push(message.to_vec()),
            Ok(None) => break false,
            Err(_) => break true,
        }
    };
    let mut expected: Vec<&[u8]> = stream.split(|&byte| byte == 0).collect();
    let too_long = expected.iter().position(|piece| piece.len() >= MAX_MESSAGE);
    assert_eq!(oversize, too_long.is_some());
    // Without a NUL after it the last piece is not a message yet.
    let last = expected.len() - 1;
    expected.truncate(too_long.unwrap_or(last));
    assert!(got.iter().eq(&expected), "{} messages, {} expected", got.len(), expected.len());
}

/// No message makes the parser panic, and what it has understood means the same when it is sent
/// again. The same holds for the errors that it answers.
pub fn request(data: &[u8]) {
    let Ok(call) = serde_json::from_slice::<Call<'_>>(data) else { return };
    match Request::parse(&call) {
        Ok(request) => {
            let bytes = request.encode().unwrap();
            let call: Call<'_> = serde_json::from_slice(&bytes).unwrap();
            assert_eq!(Request::parse(&call).as_ref(), Ok(&request));
        }
        Err(error) => {
            let bytes = serde_json::to_vec(&error).unwrap();
            assert_eq!(serde_json::from_slice::<Error>(&bytes).unwrap(), error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{Acquire, Method};
    use proptest::prelude::*;

    /// Strings that a request might hold, and some that it had better not.
    fn text() -> impl Strategy<Value = String> {
        prop_oneof![
            Just(String::new()),
            Just("web1".to_owned()),
            Just("0000:65:00.0".to_owned()),
            Just("83b8f4f2-509f-382f-3c1e-e6bfe0fa1001".to_owned()),
            "[a-z]{0,3}",
            ".{0,80}",
        ]
    }

    /// JSON of the kinds that come in requests, with their fields' names.
    fn json() -> impl Strategy<Value = serde_json::Value> {
        const NAMES: &[&str] = &[
            "vm",
            "devices",
            "withhold",
            "handout",
            "backend",
            "container",
            "lease",
            "key",
            "iova",
            "size",
            "read",
            "write",
            "memory",
            "offset",
            "bdf",
            "vf_of",
            "vendor",
            "device",
            "mdev",
            "interface",
            "vf_token",
        ];
        let leaf = prop_oneof![
            Just(serde_json::Value::Null),
            any::<bool>().prop_map(Into::into),
            any::<u64>().prop_map(Into::into),
            any::<i64>().prop_map(Into::into),
            any::<f64>().prop_map(Into::into),
            text().prop_map(Into::into),
            Just("devices".into()),
            Just("type1".into()),
        ];
        leaf.prop_recursive(3, 24, 8, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Into::into),
                proptest::collection::hash_map(proptest::sample::select(NAMES), inner, 0..6)
                    .prop_map(|map| {
                        let map = map.into_iter().map(|(name, value)| (name.to_owned(), value));
                        serde_json::Value::Object(map.collect())
                    }),
            ]
        })
    }

    fn method() -> impl Strategy<Value = String> {
        let known = proptest::sample::select(Request::NAMES).prop_map(str::to_owned);
        prop_oneof![known, ".{0,200}"]
    }

    /// A request that is right, or right but for one field.
    fn acquire() -> impl Strategy<Value = serde_json::Value> {
        (text(), proptest::collection::vec(text(), 0..4), proptest::option::of(json())).prop_map(
            |(vm, devices, odd)| {
                let mut acquire = serde_json::json!({ "vm": vm, "devices": devices });
                if let Some(odd) = odd {
                    acquire["withhold"] = odd;
                }
                acquire
            },
        )
    }

    proptest! {
        // Long streams: a few dozen are enough without optimisation.
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn framing_is_splitting(data in proptest::collection::vec(any::<u8>(), 0..400)) {
            framing(&data);
        }
    }

    proptest! {
        #[test]
        fn framing_is_splitting_when_messages_are_short(
            data in proptest::collection::vec(prop_oneof![Just(0), any::<u8>()], 0..500)
        ) {
            framing(&data);
        }

        #[test]
        fn no_bytes_upset_the_parser(data in proptest::collection::vec(any::<u8>(), 0..200)) {
            request(&data);
        }

        #[test]
        fn no_json_upsets_the_parser(method in method(), parameters in json()) {
            let call = serde_json::json!({ "method": method, "parameters": parameters });
            request(call.to_string().as_bytes());
        }

        #[test]
        fn an_acquire_means_the_same_again(parameters in acquire()) {
            let call = serde_json::json!({ "method": Acquire::NAME, "parameters": parameters });
            request(call.to_string().as_bytes());
        }
    }

    #[test]
    fn json_that_is_too_deep_is_refused_not_followed() {
        for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
            let deep = format!("{}1{}", open.repeat(10_000), close.repeat(10_000));
            let call = format!("{{\"method\":\"{}\",\"parameters\":{deep}}}", Acquire::NAME);
            let call: Call<'_> = match serde_json::from_str(&call) {
                Ok(call) => call,
                Err(_) => continue,
            };
            assert!(matches!(Request::parse(&call), Err(Error::BadRequest { .. })));
        }
    }
}
