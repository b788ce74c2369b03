//! The device nodes that VFIO and iommufd are reached through.

use std::fmt;

/// A VFIO device node, by what it is rather than by its path.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Node {
    /// `/dev/vfio/vfio`: a new container with every open.
    Container,
    /// `/dev/vfio/N`: the IOMMU group N.
    Group(u32),
    /// `/dev/vfio/noiommu-N`: a group without an IOMMU behind it.
    NoIommuGroup(u32),
    /// `/dev/iommu`: a new iommufd with every open.
    Iommu,
    /// `/dev/vfio/devices/vfioN`: a device by itself, not by its group.
    Cdev(u32),
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Node::Container => f.write_str("/dev/vfio/vfio"),
            Node::Group(id) => write!(f, "/dev/vfio/{id}"),
            Node::NoIommuGroup(id) => write!(f, "/dev/vfio/noiommu-{id}"),
            Node::Iommu => f.write_str("/dev/iommu"),
            Node::Cdev(number) => write!(f, "/dev/vfio/devices/vfio{number}"),
        }
    }
}
