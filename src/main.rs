//! Arguments → configuration → run; the only exit. Status 0: it is done. 1: the machine said no. 2: the user has to write
//! something else. 3: a client command found no server.

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use nbd_server::background::Background;
use nbd_server::cli;
use nbd_server::config::{
    self, Command, Config, ConfigCommand, ConfigError, FileError, Origins, ReadError, Serve, Surroundings,
};
use nbd_server::nbd::PassedSocket;
use nbd_server::server::{self, Logging, PassedError};

/// What a cancelled command began on a thread gets this long to end. A local store removes its temporary file; but a thread
/// that waits for a pipe, on whose other side nobody moves, never ends.
const LAST_WORK: Duration = Duration::from_secs(1);
/// It gives back what is free, while it is used at all. The C library's keeps what lies between things in use: after a cold
/// image has been read over four connections, 160 MiB instead of 30, for as long as the server runs.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const FAILURE: u8 = 1;
const USAGE: u8 = 2;

fn main() -> ExitCode {
    // The allocator asks the system for pages of 2 MiB, and buffers side by side look like one to it; the whole of each such
    // page is resident once a byte of it is used. A system that does not know them does not know this, either.
    let _ = rustix::thread::disable_transparent_huge_pages(true);
    match run() {
        Ok(status) => status,
        Err(Refused::Arguments(refused)) => {
            // Help and version come this way too, with status 0; nothing helps if the terminal is gone.
            let _ = refused.print();
            ExitCode::from(u8::try_from(refused.exit_code()).unwrap_or(USAGE))
        }
        Err(refused) => complain(&refused, USAGE),
    }
}

/// What the user has to write otherwise.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error(transparent)]
    Arguments(Box<clap::Error>),
    #[error(transparent)]
    File(FileError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Passed(#[from] PassedError),
}

impl From<ReadError> for Refused {
    fn from(e: ReadError) -> Self {
        match e {
            ReadError::Arguments(e) => Self::Arguments(e),
            ReadError::File(e) => Self::File(e),
        }
    }
}

fn run() -> Result<ExitCode, Refused> {
    let args: Vec<_> = std::env::args_os().collect();
    let (cli, origins) = config::read(args.clone())?;
    match cli.command {
        Command::Serve(flags) => {
            let passed = server::passed_sockets()?;
            let config = checked(flags, !passed.is_empty())?;
            Ok(serve(config, passed, args, origins))
        }
        Command::Config(ConfigCommand::Check(check)) => {
            let (meant, _) = config::read(check.serve())?;
            if let Command::Serve(flags) = meant.command {
                checked(flags, false)?;
            }
            Ok(print(&format!("{} can be used\n", check.file.display())))
        }
        Command::Client(command) => Ok(ask(command)),
        Command::Config(ConfigCommand::Show(flags)) => Ok(print(&origins.show(&checked(flags, false)?))),
    }
}

fn print(text: &str) -> ExitCode {
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::from(FAILURE),
    }
}

fn checked(flags: Box<Serve>, sockets_passed: bool) -> Result<Config, ConfigError> {
    surrounded(sockets_passed, |surroundings| flags.check(surroundings))
}

fn surrounded<T>(sockets_passed: bool, work: impl FnOnce(&Surroundings<'_>) -> T) -> T {
    let variable = |name: &str| std::env::var(name).ok();
    let root = rustix::process::geteuid().is_root();
    work(&Surroundings { root, variable: &variable, sockets_passed })
}

/// A client command, from start to end.
fn ask(command: cli::Command) -> ExitCode {
    server::show_warnings();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => return complain(&format!("cannot start the runtime: {e}"), FAILURE),
    };
    let ended = surrounded(false, |surroundings| runtime.block_on(command.run(surroundings)));
    runtime.shutdown_timeout(LAST_WORK);
    match ended {
        Ok(text) => print(&text),
        Err(e) => {
            complain(&e, FAILURE);
            if let Some(remedy) = e.remedy() {
                let _ = writeln!(std::io::stderr(), "hint: {remedy}");
            }
            e.status()
        }
    }
}

fn serve(config: Config, passed: Vec<PassedSocket>, args: Vec<OsString>, origins: Origins) -> ExitCode {
    let logging = Logging::start(config.log_level, config.log_format, args, origins);
    server::take_all_descriptors();
    let started = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let (runtime, (background, threads)) = match started.and_then(|runtime| Ok((runtime, Background::start()?))) {
        Ok(started) => started,
        Err(e) => return complain(&format!("cannot start the runtime: {e}"), FAILURE),
    };
    let ended = runtime.block_on(server::run(config, passed, logging, background));
    // Blocking work that a second signal overtook is not waited for.
    runtime.shutdown_background();
    threads.shutdown_background();
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) if e.is_usage() => complain(&e, USAGE),
        Err(e) => complain(&e, FAILURE),
    }
}

/// One line on stderr, whatever the store put into its answer.
fn complain(what: &dyn std::fmt::Display, status: u8) -> ExitCode {
    let line = what.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
    let _ = writeln!(std::io::stderr(), "error: {line}");
    ExitCode::from(status)
}
