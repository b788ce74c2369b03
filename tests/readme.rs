//! What the documentation shows is what there is: its policies are good, its calls parse. Its Rust
//! is compiled by the documentation tests.

#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)] // tests

use vfio_broker::policy::Policy;
use vfio_broker::protocol::{Call, Error, Request};

/// The code blocks of a page in one language.
fn blocks(page: &str, language: &str) -> Vec<String> {
    let text = std::fs::read_to_string(page).unwrap();
    let fence = format!("```{language}\n");
    let parts = text.split(&fence).skip(1);
    parts.map(|part| part.split("```").next().unwrap().to_owned()).collect()
}

#[test]
fn the_readmes_policy_is_good() {
    let policies = blocks("README.md", "toml");
    assert_eq!(policies.len(), 1);
    for text in policies {
        let policy = Policy::parse("README.md", &text, &());
        let policy = policy.unwrap_or_else(|problems| panic!("{problems}"));
        assert_eq!(policy.warnings().iter().count(), 0);
    }
    let shells = blocks("README.md", "sh");
    let shell = shells.iter().find(|text| text.contains("<<END")).unwrap();
    let inline = shell.split("<<END\n").nth(1).unwrap().split("END\n").next().unwrap();
    let inline = inline.replace("$dev", "0000:65:00.0");
    Policy::parse("README.md", &inline, &()).unwrap_or_else(|problems| panic!("{problems}"));
}

#[test]
fn the_protocols_examples_are_messages() {
    let mut calls = 0;
    for text in blocks("docs/protocol.md", "json") {
        if text.contains("\"method\"") {
            let call: Call<'_> = serde_json::from_str(&text).unwrap();
            Request::parse(&call).unwrap_or_else(|error| panic!("{error} in {text}"));
            calls += 1;
        } else if text.contains("\"error\"") {
            let error: Error = serde_json::from_str(&text).unwrap();
            assert!(matches!(error, Error::Busy { holder: Some(_), .. }));
        } else {
            let reply: serde_json::Value = serde_json::from_str(&text).unwrap();
            let parameters = reply["parameters"].clone();
            let event = serde_json::from_value::<vfio_broker::protocol::Event>(parameters.clone());
            let acquired = serde_json::from_value::<vfio_broker::protocol::Acquired>(parameters);
            assert!(event.is_ok() || acquired.is_ok(), "{text}");
        }
    }
    assert_eq!(calls, 4);
}
