//! `vfio-broker`: everything a person types. See `vfio_broker::cli`.

fn main() -> std::process::ExitCode {
    vfio_broker::daemon::be_process_if_asked().unwrap_or_else(vfio_broker::cli::main)
}
