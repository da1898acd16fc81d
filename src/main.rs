//! Arguments in, exit status out.

fn main() -> std::process::ExitCode {
    dbranch::cli::main()
}
