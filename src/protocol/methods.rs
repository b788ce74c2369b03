//! The methods: one line each, from which their names, their parser and the rules for them are made.

use super::administration::*;
use super::messages::*;
use super::varlink::{Call, GetInfo, GetInterfaceDescription, Info, InterfaceDescription};
use super::{Error, INTERFACE, SERVICE};
use serde::{Deserialize, Serialize};

/// Gives the table to a macro: interface, method, reply and [`Rules`].
macro_rules! with_methods {
    ($make:ident) => {
        $make! {
            "org.vfiobroker.Broker" Acquire -> Acquired: needs_reply;
            "org.vfiobroker.Broker" GetFds -> Fds: needs_reply repeatable;
            "org.vfiobroker.Broker" Release -> Released:;
            "org.vfiobroker.Broker" MapDma -> Empty: takes_files;
            "org.vfiobroker.Broker" UnmapDma -> Unmapped:;
            "org.vfiobroker.Broker" SetMemlock -> Memlock:;
            "org.vfiobroker.Broker" Topology -> Groups: repeatable for_administrators;
            "org.vfiobroker.Broker" Leases -> LeaseList: repeatable for_administrators;
            "org.vfiobroker.Broker" Watch -> Event: needs_reply needs_more for_administrators;
            "org.vfiobroker.Broker" Status -> BrokerStatus: for_strangers repeatable;
            "org.vfiobroker.Broker" Revoke -> Revoked: for_administrators;
            "org.vfiobroker.Broker" Drain -> Drained: needs_reply needs_more for_administrators;
            "org.vfiobroker.Broker" Confirm -> Confirmed: for_administrators;
            "org.varlink.service" GetInfo -> Info: for_strangers repeatable;
            "org.varlink.service" GetInterfaceDescription -> InterfaceDescription:
                for_strangers repeatable;
        }
    };
}

/// What holds for a method, whatever its parameters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// Its reply is what it is for: it can't be called `oneway`.
    pub needs_reply: bool,
    /// It changes nothing, so it can be called again when its answer was lost.
    pub repeatable: bool,
    /// Open files come with the call.
    pub takes_files: bool,
    /// It is only answered with many replies.
    pub needs_more: bool,
    /// A peer that belongs to no tenant may call it.
    pub for_strangers: bool,
    /// An administrator that belongs to no tenant may call it.
    pub for_administrators: bool,
}

/// A method: its name and its types.
pub trait Method: Serialize {
    /// The method's full name.
    const NAME: &'static str;
    /// What holds for it.
    const RULES: Rules;
    /// What it returns.
    type Reply: Serialize + for<'de> Deserialize<'de>;
}

macro_rules! define {
    ($($interface:literal $method:ident -> $reply:ty: $($rule:ident)*;)*) => {
        $(impl Method for $method {
            const NAME: &'static str = concat!($interface, ".", stringify!($method));
            const RULES: Rules = Rules { $($rule: true,)* ..NO_RULES };
            type Reply = $reply;
        })*

        /// A call, parsed.
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub enum Request {
            $(#[doc = concat!("`", $interface, ".", stringify!($method), "`")] $method($method),)*
        }

        impl Request {
            /// The full names of all methods.
            pub const NAMES: &[&str] = &[$($method::NAME),*];

            /// What holds for the method.
            pub fn rules(&self) -> Rules {
                match self {
                    $(Self::$method(_) => $method::RULES,)*
                }
            }

            fn read(method: &str, parameters: &str) -> Result<Self, Error> {
                match method {
                    $($method::NAME => read(parameters).map(Self::$method),)*
                    unknown => Err(no_such(unknown)),
                }
            }

            /// The call as a client sends it, without the NUL.
            #[cfg(any(test, fuzzing))]
            pub(crate) fn encode(&self) -> serde_json::Result<Vec<u8>> {
                match self {
                    $(Self::$method(call) => super::varlink::encode(call, false),)*
                }
            }
        }
    };
}

const NO_RULES: Rules = Rules {
    needs_reply: false,
    repeatable: false,
    takes_files: false,
    needs_more: false,
    for_strangers: false,
    for_administrators: false,
};

with_methods!(define);

/// For what is to be done for each method by its type.
#[cfg(any(test, fuzzing))]
pub(crate) use with_methods;

impl Request {
    /// Parses a call's parameters for the method it names. Fields that are too long, devices that
    /// come twice and the like are found here, so that nothing behind sees them.
    ///
    /// # Errors
    /// [`Error::BadRequest`], [`Error::MethodNotFound`] and [`Error::InterfaceNotFound`].
    pub fn parse(call: &Call<'_>) -> Result<Self, Error> {
        let request = Self::read(&call.method, call.parameters.map_or("{}", |raw| raw.get()))?;
        if let Self::Acquire(acquire) = &request {
            acquire.check()?;
        }
        Ok(request)
    }
}

fn read<'de, T: Deserialize<'de>>(text: &'de str) -> Result<T, Error> {
    // "parameters": null is what some clients send for none.
    let text = if text == "null" { "{}" } else { text };
    // serde would also take a struct's fields as a list.
    if !text.starts_with('{') {
        return Err(Error::bad("parameters", "not an object"));
    }
    serde_json::from_str(text).map_err(|error| Error::bad("parameters", error))
}

fn no_such(method: &str) -> Error {
    let interface = method.rsplit_once('.').map_or("", |(interface, _)| interface);
    let cut = |text: &str| text.chars().take(100).collect();
    if [INTERFACE, SERVICE].contains(&interface) {
        Error::MethodNotFound { method: cut(method) }
    } else {
        Error::InterfaceNotFound { interface: cut(interface) }
    }
}
