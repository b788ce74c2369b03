//! The cases. Each is a function that makes calls and writes down what the kernel says.

mod attach;
mod cdev;
mod charges;
mod container;
mod device;
mod dirty;
mod drivers;
mod group;
mod ioas;
mod ioas_copy;
mod ioas_file;
mod iommufd;
mod irqs;
mod lifetimes;
mod machines;
mod map;
mod names;
mod regions;
mod resets;
mod sysfs;
mod sysfs_writes;
mod unmap;
mod vaddr;

use crate::script::Script;

/// A case.
pub(crate) struct Case {
    /// Its file and function, `group::open_twice`.
    pub(crate) name: String,
    /// Which machine of the lab it is for.
    pub(crate) machine: &'static str,
    /// How many mappings a container may have meanwhile, where that is not the default.
    pub(crate) limit: Option<u32>,
    /// Whether it needs rights to give up, so that only root can run it.
    pub(crate) root: bool,
    /// Whether it takes rights that are not even every root's.
    pub(crate) rights: bool,
    /// Whether it is for kernels with iommufd and cdevs alone.
    pub(crate) cdev: bool,
    pub(crate) run: fn(&Script),
}

/// Lists functions as cases, under the name of their file.
macro_rules! cases {
    ($($name:ident),* $(,)?) => {
        pub(crate) fn cases() -> Vec<crate::cases::Case> {
            let file = module_path!().rsplit("::").next().unwrap();
            vec![$(crate::cases::Case {
                name: format!("{file}::{}", stringify!($name)),
                machine: "default",
                limit: None,
                root: false,
                rights: false,
                cdev: false,
                run: $name,
            }),*]
        }
    };
}
use cases;

/// All cases, in the order in which they are recorded.
pub(crate) fn all() -> Vec<Case> {
    let mut all = Vec::new();
    for file in [
        group::cases,
        names::cases,
        container::cases,
        map::cases,
        unmap::cases,
        vaddr::cases,
        dirty::cases,
        device::cases,
        regions::cases,
        irqs::cases,
        resets::cases,
        lifetimes::cases,
        drivers::cases,
        sysfs::cases,
        sysfs_writes::cases,
        machines::cases,
    ] {
        all.extend(file());
    }
    for file in [
        iommufd::cases,
        ioas::cases,
        ioas_copy::cases,
        ioas_file::cases,
        cdev::cases,
        attach::cases,
        charges::cases,
    ] {
        all.extend(file().into_iter().map(|case| Case { cdev: true, ..case }));
    }
    for case in &mut all {
        match case.name.as_str() {
            "map::as_many_as_the_limit" | "map::the_limit_comes_after_overlap" => {
                case.limit = Some(3);
            }
            name if name.starts_with("machines::no_intremap") => {
                case.machine = "no-intremap";
                case.cdev = name.ends_with("_cdev");
            }
            name if name.starts_with("machines::no_iommu") => {
                (case.machine, case.root) = ("no-iommu", true);
                case.cdev = name.ends_with("_cdev");
            }
            name if name.starts_with("sysfs_writes::") => case.cdev = name.ends_with("_cdev"),
            // What a kernel without them says.
            "iommufd::opens"
            | "cdev::nodes"
            | "cdev::opens_that_do_not_work"
            | "cdev::attach_of_a_device_from_its_group" => case.cdev = false,
            "lifetimes::nodes_of_others"
            | "iommufd::nodes_of_others"
            | "iommufd::rlimit_mode_wants_a_right"
            | "charges::root_is_not_charged" => case.root = true,
            "iommufd::rlimit_mode"
            | "iommufd::rlimit_mode_of_one_in_use"
            | "charges::each_process_has_its_own_limit" => case.rights = true,
            _ => {}
        }
    }
    all
}
