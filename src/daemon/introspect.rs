//! `org.varlink.service`: what this is and what it can do.

use super::outgoing::Answer;
use crate::protocol::{
    DESCRIPTION, Error, INTERFACE, Info, InterfaceDescription, SERVICE, SERVICE_DESCRIPTION,
};

pub(super) fn info() -> Info {
    Info {
        vendor: "vfio-broker".into(),
        product: "vfio-brokerd".into(),
        version: env!("CARGO_PKG_VERSION").into(),
        url: "https://vfiobroker.org".into(),
        interfaces: vec![SERVICE.into(), INTERFACE.into()],
    }
}

pub(super) fn describe(interface: &str) -> Result<Answer, Error> {
    let description = match interface {
        INTERFACE => DESCRIPTION,
        SERVICE => SERVICE_DESCRIPTION,
        _ => {
            let interface = interface.chars().take(100).collect();
            return Err(Error::InterfaceNotFound { interface });
        }
    };
    Ok(Answer::reply(InterfaceDescription { description: description.into() }))
}
