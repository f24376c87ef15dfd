//! Where a setting comes from: a flag, else an environment variable, else the file, else a default.
//!
//! The file's values take the place of the defaults of the flags, so the same parsers judge them and the same rules
//! decide which value counts. A setting that the file names wrongly is refused even if a flag overrides it.

use std::ffi::{OsStr, OsString};
use std::fmt::Write;

use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, CommandFactory, FromArgMatches};

use super::file::{FileError, Setting, Settings};
use super::{Cli, Config, StoreConfig};

/// Flags that are about the file or the program, not settings.
const NO_SETTINGS: [&str; 3] = ["config", "help", "version"];

/// Why no arguments came about.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The command line or the environment. Help and version come this way too.
    #[error(transparent)]
    Arguments(#[from] Box<clap::Error>),
    /// The configuration file.
    #[error(transparent)]
    File(#[from] FileError),
}

/// Whence each value of a command line comes.
#[derive(Debug)]
pub struct Origins {
    matches: ArgMatches,
    file: Option<Settings>,
}

/// Reads arguments, the environment, and the file that one of them names: what was asked for, and whence it comes.
///
/// # Errors
/// [`ReadError`], which names the flag, the variable or the line.
pub fn read<I>(args: I) -> Result<(Cli, Origins), ReadError>
where
    I: IntoIterator<Item = OsString> + Clone,
{
    let boxed = |e: clap::Error| ReadError::from(Box::new(e));
    let parse = |command: clap::Command| {
        let matches = command.try_get_matches_from(args.clone()).map_err(boxed)?;
        let cli = Cli::from_arg_matches(&matches).map_err(boxed)?;
        Ok::<_, ReadError>((cli, matches))
    };
    let (cli, matches) = parse(Cli::command())?;
    let Some(path) = cli.command.config_file() else { return Ok((cli, Origins { matches, file: None })) };
    let file = Settings::read(path)?;
    check(&file)?;
    let layered = |command: clap::Command| layer(command, &file);
    let command = Cli::command()
        .mut_subcommand("serve", layered)
        .mut_subcommand("config", |config| config.mut_subcommand("show", layered))
        .mut_subcommand("import", layered)
        .mut_subcommand("export-image", layered);
    let (cli, matches) = parse(command)?;
    Ok((cli, Origins { matches, file: Some(file) }))
}

fn serve() -> clap::Command {
    let cli = Cli::command();
    cli.find_subcommand("serve").cloned().unwrap_or(cli)
}

fn is_named(arg: &Arg, key: &str) -> bool {
    arg.get_long() == Some(key) && !NO_SETTINGS.contains(&key)
}

/// Has each setting judged by its flag.
fn check(file: &Settings) -> Result<(), FileError> {
    let serve = serve();
    for setting in &file.settings {
        let Some(arg) = serve.get_arguments().find(|arg| is_named(arg, &setting.key)) else {
            return Err(file.refused(setting, unknown(&serve, &setting.key)));
        };
        if setting.values.len() != 1 && !matches!(arg.get_action(), clap::ArgAction::Append) {
            let reason = format!("{} has {} values: give one", setting.key, setting.values.len());
            return Err(file.refused(setting, reason));
        }
        let flags = setting.values.iter().map(|value| format!("--{}={value}", setting.key));
        let args = ["nbd-server", "serve"].map(str::to_owned).into_iter().chain(flags);
        Cli::command().try_get_matches_from(args).map_err(|e| file.refused(setting, first_paragraph(&e)))?;
    }
    Ok(())
}

fn unknown(serve: &clap::Command, key: &str) -> String {
    let dashed = key.replace('_', "-");
    let meant = if dashed != key && serve.get_arguments().any(|arg| is_named(arg, &dashed)) {
        format!("it is called {dashed}")
    } else {
        "the settings are the flags that nbd-server serve --help lists, without the dashes".to_owned()
    };
    format!("there is no setting {key}: {meant}")
}

/// What the argument parser says, as one line and without its advice on command lines.
fn first_paragraph(error: &clap::Error) -> String {
    let text = error.to_string();
    let text = text.split("\n\n").next().unwrap_or_default().trim_start_matches("error: ");
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn layer(command: clap::Command, file: &Settings) -> clap::Command {
    command.mut_args(|arg| match file.settings.iter().find(|setting| is_named(&arg, &setting.key)) {
        Some(setting) => arg.default_values(setting.values.clone()),
        None => arg,
    })
}

impl Origins {
    /// Every setting of a `config show` with its value and whence it comes, as a configuration file.
    #[must_use]
    pub fn show(&self, config: &Config) -> String {
        let mut text = String::new();
        let matches = self.matches.subcommand_matches("config").and_then(|config| config.subcommand_matches("show"));
        for arg in serve().get_arguments() {
            let Some(key) = arg.get_long().filter(|key| is_named(arg, key)) else { continue };
            let source = matches.and_then(|matches| matches.value_source(arg.get_id().as_str()));
            let given = matches.and_then(|matches| matches.get_raw(arg.get_id().as_str()));
            let given: Vec<_> = given.into_iter().flatten().map(|value| value.to_string_lossy().into_owned()).collect();
            let values = if given.is_empty() { config.defaults_of(key) } else { given };
            let whence = self.whence(arg, source);
            // Writing to a string does not fail.
            let _ = match shown(arg, &values) {
                Some(value) => writeln!(text, "{key} = {value}  # {whence}"),
                None => writeln!(text, "# {key} is not set"),
            };
        }
        text
    }

    /// The settings of a `serve` whose values are other ones than in `before`, by name.
    #[must_use]
    pub fn changed_since(&self, before: &Self) -> Vec<String> {
        let serve = serve();
        let keys = serve.get_arguments().filter_map(|arg| Some((arg, arg.get_long()?)));
        let changed = |(arg, _): &(&Arg, &str)| self.of_serve(arg) != before.of_serve(arg);
        keys.filter(|(arg, key)| is_named(arg, key)).filter(changed).map(|(_, key)| key.to_owned()).collect()
    }

    fn of_serve(&self, arg: &Arg) -> Vec<&OsStr> {
        let values = self.matches.subcommand_matches("serve").and_then(|serve| serve.get_raw(arg.get_id().as_str()));
        values.into_iter().flatten().collect()
    }

    fn whence(&self, arg: &Arg, source: Option<ValueSource>) -> String {
        let of_file = |setting: &&Setting| is_named(arg, &setting.key);
        let in_file = self.file.as_ref().and_then(|file| Some((file, file.settings.iter().find(of_file)?)));
        match (source, in_file) {
            (Some(ValueSource::CommandLine), _) => "flag".to_owned(),
            (Some(ValueSource::EnvVariable), _) => {
                let name = arg.get_env().map(|name| name.to_string_lossy()).unwrap_or_default();
                format!("environment variable {name}")
            }
            (_, Some((file, setting))) => format!("{} line {}", file.path.display(), setting.line),
            _ => "default".to_owned(),
        }
    }
}

/// As the file takes it; `None` if there is no value.
fn shown(arg: &Arg, values: &[String]) -> Option<String> {
    let one = |value: &String| match value.parse::<u64>() {
        Ok(number) if number.to_string() == *value => value.clone(),
        // A password in front of a host name; it is refused elsewhere, and not repeated here.
        _ if value.contains("://") && value.contains('@') => r#""…@…""#.to_owned(),
        // A JSON text is a TOML text.
        _ => serde_json::Value::from(value.as_str()).to_string(),
    };
    match values {
        [] => None,
        [value] if !matches!(arg.get_action(), clap::ArgAction::Append) => Some(one(value)),
        several => Some(format!("[{}]", several.iter().map(one).collect::<Vec<_>>().join(", "))),
    }
}

impl Config {
    /// What was filled in for a setting that nobody gave.
    fn defaults_of(&self, key: &str) -> Vec<String> {
        let path = |path: &std::path::Path| vec![path.display().to_string()];
        match (key, &self.store) {
            ("cache-root", _) => path(&self.cache_root),
            ("admin-sock", _) => path(&self.admin_sock),
            ("local-root", StoreConfig::Local(root)) => path(root),
            ("listen", _) => self.listen.iter().map(ToString::to_string).collect(),
            _ => Vec::new(),
        }
    }
}
