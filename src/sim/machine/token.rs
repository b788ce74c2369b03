//! Device names and VF tokens: what `VFIO_GROUP_GET_DEVICE_FD` is given, and newer kernels'
//! `VFIO_DEVICE_BIND_IOMMUFD`.

use super::Machine;
use nix::errno::Errno;
use uuid::Uuid;

impl Machine {
    /// Whether `text` means the device, with the token that it takes.
    ///
    /// # Errors
    /// EINVAL an option that is unknown, there twice or superfluous; EACCES no token or a wrong
    /// one.
    pub(super) fn matches(&mut self, index: usize, text: &[u8]) -> Result<bool, Errno> {
        let profile = self.profile();
        let device = self.devices.get(index).filter(|device| device.is_registered(profile));
        let Some(device) = device else {
            return Ok(false);
        };
        let Some(mut rest) = text.strip_prefix(device.facts.bdf.to_string().as_bytes()) else {
            return Ok(false);
        };
        if rest.first().is_some_and(|&byte| byte != b' ') {
            return Ok(false);
        }
        let mut token = None;
        while let Some(&byte) = rest.first() {
            if byte == b' ' {
                rest = &rest[1..];
                continue;
            }
            let value = rest.strip_prefix(b"vf_token=").filter(|_| token.is_none());
            let (uuid, behind) =
                value.and_then(|it| it.split_at_checked(36)).ok_or(Errno::EINVAL)?;
            // Of the forms that `uuid` reads, the kernel's alone has 36 characters.
            token = Some(Uuid::try_parse_ascii(uuid).map_err(|_| Errno::EINVAL)?);
            rest = behind;
        }
        self.check_token(index, token)?;
        Ok(true)
    }

    pub(super) fn check_token(&mut self, index: usize, token: Option<Uuid>) -> Result<(), Errno> {
        let Some(device) = self.devices.get(index) else { return Err(Errno::ENODEV) };
        if let Some(pf) = device.facts.physfn {
            let pf = self.devices.iter().find(|device| device.facts.bdf == pf && device.on_vfio);
            return match (pf, token) {
                (None, None) => Ok(()),
                (None, Some(_)) => Err(Errno::EINVAL),
                (Some(_), None) => Err(Errno::EACCES),
                (Some(pf), Some(token)) if token == pf.token => Ok(()),
                (Some(_), Some(_)) => Err(Errno::EACCES),
            };
        }
        if !device.is_pf() {
            return if token.is_some() { Err(Errno::EINVAL) } else { Ok(()) };
        }
        if self.open_vfs(index) > 0 {
            return if token == Some(device.token) { Ok(()) } else { Err(Errno::EACCES) };
        }
        if let (Some(token), Some(device)) = (token, self.devices.get_mut(index)) {
            device.token = token;
        }
        Ok(())
    }

    /// How many VFs of a PF are open.
    fn open_vfs(&self, pf: usize) -> usize {
        let Some(pf) = self.devices.get(pf).map(|device| device.facts.bdf) else { return 0 };
        self.devices.iter().filter(|vf| vf.facts.physfn == Some(pf) && vf.opens > 0).count()
    }
}
