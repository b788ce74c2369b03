//! What is asked for, put together step by step.

use super::{Error, Result};
use crate::protocol::{self, Backend, Bdf, DeviceSpec, Handout};

/// A request for devices. Only the vm's name and one device are needed.
///
/// ```
/// use vfio_broker::client::Acquire;
/// use vfio_broker::protocol::Handout;
///
/// let request = Acquire::new("web1")
///     .device("0000:65:00.0") // this one,
///     .device("8086:10d3") // any free one of that kind,
///     .device("vf:0000:3b:00.0") // any free virtual function of that device
///     .withhold("0000:65:00.1") // keep this one from everybody
///     .handout(Handout::Group);
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Acquire {
    request: protocol::Acquire,
    wrong: Option<String>,
}

impl Acquire {
    /// A request for a VM of that name: 1 to 64 of letters, digits and `-_.:@+`.
    pub fn new(vm: impl Into<String>) -> Self {
        let request = protocol::Acquire { vm: vm.into(), ..protocol::Acquire::default() };
        Self { request, wrong: None }
    }

    /// Asks for a device: `0000:65:00.0` (or `65:00.0`), `VENDOR:DEVICE` for any free one of that
    /// kind, `vf:BDF` for any free VF of that PF, or an mdev's UUID.
    #[must_use]
    pub fn device(mut self, device: &str) -> Self {
        let spec = self.spec(device);
        self.request.devices.extend(spec);
        self
    }

    /// Names a function of the devices' groups that nobody is to use meanwhile.
    #[must_use]
    pub fn withhold(mut self, device: &str) -> Self {
        let spec = self.spec(device);
        self.request.withhold.get_or_insert_default().extend(spec);
        self
    }

    /// In which form the open files are given; the broker says which it used.
    #[must_use]
    pub fn handout(mut self, handout: Handout) -> Self {
        self.request.handout = Some(handout);
        self
    }

    /// Through which interface of the kernel.
    #[must_use]
    pub fn backend(mut self, backend: Backend) -> Self {
        self.request.backend = Some(backend);
        self
    }

    /// Joins a shared container of the policy.
    #[must_use]
    pub fn container(mut self, name: impl Into<String>) -> Self {
        self.request.container = Some(name.into());
        self
    }

    /// The token that a VF of a PF on vfio-pci wants.
    #[must_use]
    pub fn vf_token(mut self, uuid: impl Into<String>) -> Self {
        self.request.vf_token = Some(uuid.into());
        self
    }

    fn spec(&mut self, device: &str) -> Option<DeviceSpec> {
        let spec = parse(device);
        if spec.is_none() && self.wrong.is_none() {
            self.wrong = Some(device.to_owned());
        }
        spec
    }

    /// The message.
    ///
    /// # Errors
    /// A device that was named in no form there is.
    pub fn into_request(self) -> Result<protocol::Acquire> {
        match self.wrong {
            None => Ok(self.request),
            Some(device) => Err(Error::Request {
                field: "devices",
                reason: format!(
                    "{device:?} is none of 65:00.0, 0000:65:00.0, VENDOR:DEVICE (8086:10d3), and vf:BDF"
                ),
            }),
        }
    }
}

impl From<protocol::Acquire> for Acquire {
    fn from(request: protocol::Acquire) -> Self {
        Self { request, wrong: None }
    }
}

fn parse(text: &str) -> Option<DeviceSpec> {
    let bdf = |text: &str| Bdf::typed(text).ok();
    if let Some(pf) = text.strip_prefix("vf:") {
        return bdf(pf).map(|vf_of| DeviceSpec::VfOf { vf_of });
    }
    if let Some(bdf) = bdf(text) {
        return Some(DeviceSpec::Bdf { bdf });
    }
    // The two forms whose letters the protocol checks are read by it.
    let value = match text.split_once(':') {
        Some((vendor, device)) => serde_json::json!({ "vendor": vendor, "device": device }),
        None => text.into(),
    };
    serde_json::from_value(value).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn devices(text: &str) -> Result<Vec<String>> {
        let request = Acquire::new("vm").device(text).into_request()?;
        Ok(request.devices.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn a_device_is_named_in_one_of_four_forms() {
        for (text, means) in [
            ("0000:65:00.0", "0000:65:00.0"),
            ("65:00.1", "0000:65:00.1"),
            ("8086:10D3", "a 8086:10d3"),
            ("vf:0000:3b:00.0", "a VF of 0000:3b:00.0"),
            ("vf:3b:00.0", "a VF of 0000:3b:00.0"),
            ("83b8f4f2-509f-382f-3c1e-e6bfe0fa1001", "mdev 83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"),
        ] {
            assert_eq!(devices(text).unwrap(), [means]);
        }
    }

    #[test]
    fn a_device_in_another_form_is_an_error_that_names_it() {
        for odd in ["", "vf:", "8086", "8086:1", "65:00", "0000:65:00.9", "eth0"] {
            let error = devices(odd).unwrap_err().to_string();
            assert!(error.contains(&format!("{odd:?}")), "{error}");
        }
    }
}
