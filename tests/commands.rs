//! Every command and every flag of the program is used by a test that runs it: whoever adds one adds a test.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests fail the test")]

use std::fs;
use std::path::Path;

use clap::CommandFactory;
use nbd_server::config::Cli;

/// The tests, each as a text in which words that follow each other stand with one space between.
fn suites() -> Vec<String> {
    let mut texts = Vec::new();
    for entry in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests")).unwrap() {
        let path = entry.unwrap().path();
        // Not this file, which would be content with itself.
        if path.extension().is_some_and(|extension| extension == "rs") && !path.ends_with("commands.rs") {
            texts.push(fs::read_to_string(path).unwrap().replace("\", \"", " "));
        }
    }
    texts
}

/// Every command that does something, with its flags.
fn commands() -> Vec<(String, Vec<String>)> {
    fn below(command: &clap::Command, words: &str, all: &mut Vec<(String, Vec<String>)>) {
        for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help") {
            below(sub, format!("{words} {}", sub.get_name()).trim_start(), all);
        }
        if !command.has_subcommands() {
            let flags = command.get_arguments().filter_map(|arg| arg.get_long()).filter(|flag| *flag != "help");
            all.push((words.to_owned(), flags.map(|flag| format!("--{flag}")).collect()));
        }
    }
    let mut program = Cli::command();
    program.build();
    let mut all = Vec::new();
    below(&program, "", &mut all);
    all
}

/// Whether a text has a word that is not the beginning of a longer one.
fn has(text: &str, word: &str) -> bool {
    text.match_indices(word)
        .any(|(at, _)| !text[at + word.len()..].starts_with(|c: char| c.is_alphanumeric() || c == '-'))
}

#[test]
fn every_command_is_run_with_every_flag_of_its_own() {
    let (suites, mut unused) = (suites(), Vec::new());
    let commands = commands();
    assert!(commands.len() > 15, "{commands:?}");
    for (command, flags) in commands {
        // A server is what the tests start without naming it.
        let about: Vec<_> = suites.iter().filter(|text| command == "serve" || has(text, &command)).collect();
        if about.is_empty() {
            unused.push(command.clone());
        }
        let missing = flags.iter().filter(|flag| !about.iter().any(|text| has(text, flag)));
        unused.extend(missing.map(|flag| format!("{command} {flag}")));
    }
    assert!(unused.is_empty(), "no test runs {unused:#?}");
}
