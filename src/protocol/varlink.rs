//! What is Varlink's own: how calls and replies are framed, and the interface `org.varlink.service`.
//! Errors are framed by [`Error`](super::Error) itself.

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// Varlink's own interface, which every service has.
pub const SERVICE: &str = "org.varlink.service";

/// A call as a service reads it.
#[derive(Debug, Deserialize)]
pub struct Call<'a> {
    /// The method's full name.
    #[serde(borrow)]
    pub method: std::borrow::Cow<'a, str>,
    /// An object with the method's parameters; none is an empty one.
    #[serde(borrow)]
    pub parameters: Option<&'a RawValue>,
    /// The caller takes many replies.
    pub more: Option<bool>,
    /// The caller wants no reply.
    pub oneway: Option<bool>,
    /// The connection is to speak another protocol afterwards.
    pub upgrade: Option<bool>,
}

/// A reply.
#[derive(Debug, Serialize, Deserialize)]
pub struct Reply<T> {
    /// What the method returns.
    pub parameters: T,
    /// More replies to the same call will follow.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub continues: bool,
}

/// A call as a client sends it, without the NUL; with `more` it takes many replies.
///
/// # Errors
/// What writing the parameters as JSON says.
#[cfg(any(feature = "client", test, fuzzing))]
pub(crate) fn encode<M: super::Method>(parameters: &M, more: bool) -> serde_json::Result<Vec<u8>> {
    #[derive(Serialize)]
    struct Frame<'a, M> {
        method: &'a str,
        parameters: &'a M,
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        more: bool,
    }
    serde_json::to_vec(&Frame { method: M::NAME, parameters, more })
}

/// Asks what the service is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GetInfo {}

/// What the service is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Info {
    /// Who made it.
    pub vendor: String,
    /// The program.
    pub product: String,
    /// Its version.
    pub version: String,
    /// Where to read about it.
    pub url: String,
    /// The interfaces that it has.
    pub interfaces: Vec<String>,
}

/// Asks for an interface in Varlink's language.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GetInterfaceDescription {
    /// The interface's full name.
    pub interface: String,
}

/// An interface in Varlink's language.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceDescription {
    /// The text.
    pub description: String,
}
