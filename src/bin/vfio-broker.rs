//! `vfio-broker`: everything a person types. See `vfio_broker::cli`.

fn main() -> std::process::ExitCode {
    vfio_broker::daemon::be_porter_if_asked()
        .or_else(vfio_broker::daemon::be_rebinder_if_asked)
        .unwrap_or_else(vfio_broker::cli::main)
}
