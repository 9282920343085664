//! The `tidegate` program.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    // Two providers may be compiled in by dependencies; rustls wants to be told which one is meant.
    if rustls::crypto::ring::default_provider().install_default().is_err() {
        eprintln!("error: another TLS provider was installed first");
        return ExitCode::FAILURE;
    }
    tidegate::cli::main()
}
