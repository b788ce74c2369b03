//! `vfio-broker`: everything a person types. See `vfio_broker::cli`.

fn main() -> std::process::ExitCode {
    vfio_broker::cli::main()
}
