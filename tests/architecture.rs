//! The house, as a test: imports run downward only, and a file is one thought.
//!
//! The checker reads the source of `src/` as text: comments, strings and test code are taken out, and what is left is
//! searched for paths that start at the root of the crate (`crate::x`, `crate::{x, y}`, or enough `super::`).

#![allow(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use std::fs;
use std::path::{Path, PathBuf};

/// The floor of every module right below `src/`; a module that is not listed fails the test until it is given one.
const FLOORS: &[(&str, u8)] = &[
    ("main", 5),
    ("cli", 5),
    ("config", 5),
    ("server", 5),
    ("nbd", 4),
    ("admin", 4),
    ("volume", 3),
    ("cache", 2),
    ("manifest", 2),
    ("store", 1),
    ("disk", 1),
    ("clock", 1),
    ("units", 0),
];

/// Modules that never see each other, whatever their floors: the front ends talk to volumes alone, and `volume` is the
/// only place where cache and store meet.
const STRANGERS: &[(&str, &[&str])] = &[
    ("nbd", &["admin", "store", "cache", "manifest", "disk", "clock"]),
    ("admin", &["nbd", "store", "cache", "manifest", "disk", "clock"]),
    ("cache", &["store"]),
    ("manifest", &["disk"]),
];

/// The most lines of code a file may have; blank lines, comments and tests do not count.
const MAX_LINES: usize = 600;

#[test]
fn imports_run_downward_and_strangers_never_meet() {
    let mut wrong = Vec::new();
    let mut seen = 0;
    for file in sources() {
        seen += 1;
        wrong.extend(judge_imports(&file.name, &file.text));
    }
    assert!(seen > 5, "the source was not found");
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn a_file_is_one_thought() {
    let too_long: Vec<String> = sources()
        .iter()
        .map(|file| (&file.name, code_lines(&file.text)))
        .filter(|&(_, lines)| lines > MAX_LINES)
        .map(|(name, lines)| {
            format!("src/{name} has {lines} lines of code, over {MAX_LINES}: give a part its own file")
        })
        .collect();
    assert!(too_long.is_empty(), "\n{}", too_long.join("\n"));
}

struct Source {
    /// The path below `src/`.
    name: String,
    text: String,
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path: PathBuf = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(&root).unwrap().to_str().unwrap().to_owned();
                files.push(Source { name, text: fs::read_to_string(&path).unwrap() });
            }
        }
    }
    files.sort_by(|a, b| a.name.cmp(&b.name));
    files
}

/// Every import of a file that the house forbids, as a sentence.
fn judge_imports(name: &str, text: &str) -> Vec<String> {
    let module = name.split('/').next().unwrap().trim_end_matches(".rs");
    // The root of the library only lists its modules.
    if module == "lib" {
        return Vec::new();
    }
    let Some(own_floor) = floor(module) else {
        return vec![format!("src/{name}: the module {module} has no floor: list it in tests/architecture.rs")];
    };
    let strangers = STRANGERS.iter().find(|(from, _)| *from == module).map_or(&[][..], |(_, to)| to);
    let code = production_code(name, text);
    let mut wrong = Vec::new();
    for target in root_paths(&code, depth(name)) {
        if strangers.contains(&target.as_str()) {
            wrong.push(format!("src/{name}: {module} must not see {target}"));
        } else if floor(&target).is_some_and(|floor| floor > own_floor) {
            wrong.push(format!("src/{name}: {module} imports {target}, which is on a floor above it"));
        }
    }
    wrong.dedup();
    wrong
}

fn floor(module: &str) -> Option<u8> {
    FLOORS.iter().find(|(name, _)| *name == module).map(|&(_, floor)| floor)
}

/// How many `super` lead from a file's module to the root of the crate.
fn depth(name: &str) -> usize {
    name.trim_end_matches(".rs").trim_end_matches("/mod").split('/').count()
}

fn code_lines(text: &str) -> usize {
    let code = without_tests(&without_comments_and_strings(text));
    code.lines().filter(|line| !line.trim().is_empty()).count()
}

fn production_code(name: &str, text: &str) -> String {
    let is_test_file = name.ends_with("/tests.rs") || name.contains("/tests/");
    if is_test_file { String::new() } else { without_tests(&without_comments_and_strings(text)) }
}

/// The module below the root of the crate that each absolute path names.
fn root_paths(code: &str, depth: usize) -> Vec<String> {
    let tokens = tokens(code);
    let mut found = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        let after_root = if tokens[at] == "crate" && is(&tokens, at + 1, "::") {
            Some(at + 2)
        } else {
            let supers =
                (0..).take_while(|n| is(&tokens, at + 2 * n, "super") && is(&tokens, at + 2 * n + 1, "::")).count();
            let start = at + 2 * supers;
            at += 2 * supers.saturating_sub(1);
            (supers == depth).then_some(start)
        };
        if let Some(next) = after_root {
            found.extend(first_names(&tokens[next..]));
        }
        at += 1;
    }
    found
}

/// The first name of a path, or of each path in a group.
fn first_names(tokens: &[&str]) -> Vec<String> {
    let Some(&first) = tokens.first() else { return Vec::new() };
    if first != "{" {
        return vec![first.to_owned()];
    }
    let mut names = Vec::new();
    let mut level = 0;
    let mut expects_name = false;
    for &token in tokens {
        match token {
            "{" => {
                level += 1;
                expects_name = level == 1;
            }
            "}" if level == 1 => break,
            "}" => level -= 1,
            "," => expects_name = level == 1,
            name if expects_name => {
                names.push(name.to_owned());
                expects_name = false;
            }
            _ => {}
        }
    }
    names
}

fn is(tokens: &[&str], at: usize, token: &str) -> bool {
    tokens.get(at) == Some(&token)
}

/// Words, `::`, and every other visible character by itself.
fn tokens(code: &str) -> Vec<&str> {
    let mut tokens = Vec::new();
    let mut rest = code.trim_start();
    while let Some(first) = rest.chars().next() {
        let word = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
        let len = if word > 0 {
            word
        } else if rest.starts_with("::") {
            2
        } else {
            first.len_utf8()
        };
        tokens.push(&rest[..len]);
        rest = rest[len..].trim_start();
    }
    tokens
}

/// The text with comments and the content of strings and characters gone; lines stay where they are.
fn without_comments_and_strings(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let skipped = match first {
            '/' if rest.starts_with("//") => rest.find('\n').unwrap_or(rest.len()),
            '/' if rest.starts_with("/*") => block_comment(rest),
            'r' | 'b' if !out.ends_with(|c: char| c.is_alphanumeric() || c == '_') => raw_string(rest),
            '"' => quoted(rest, '"'),
            '\'' if is_char(rest) => quoted(rest, '\''),
            _ => 0,
        };
        if skipped > 0 {
            out.extend(rest[..skipped].chars().filter(|&c| c == '\n'));
            rest = &rest[skipped..];
        } else {
            out.push(first);
            rest = &rest[first.len_utf8()..];
        }
    }
    out
}

fn block_comment(text: &str) -> usize {
    let mut level = 0;
    let mut at = 0;
    while at < text.len() {
        if text[at..].starts_with("/*") {
            level += 1;
            at += 2;
        } else if text[at..].starts_with("*/") {
            level -= 1;
            at += 2;
            if level == 0 {
                return at;
            }
        } else {
            at += text[at..].chars().next().map_or(1, char::len_utf8);
        }
    }
    text.len()
}

/// The length of `r"…"`, `r#"…"#` or `br"…"`; 0 if the text does not start with one.
fn raw_string(text: &str) -> usize {
    let Some(after) = text.strip_prefix("br").or_else(|| text.strip_prefix('r')) else { return 0 };
    let hashes = after.len() - after.trim_start_matches('#').len();
    if !after[hashes..].starts_with('"') {
        return 0;
    }
    let start = text.len() - after.len() + hashes + 1;
    let end = format!("\"{}", "#".repeat(hashes));
    text[start..].find(&end).map_or(text.len(), |at| start + at + end.len())
}

fn quoted(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// Whether the quote opens a character and not a lifetime.
fn is_char(text: &str) -> bool {
    let mut chars = text.chars().skip(1);
    let first = chars.next();
    first == Some('\\') || chars.next() == Some('\'')
}

/// The code without the items under `#[cfg(test)]`, or nothing if the whole file is under it.
fn without_tests(code: &str) -> String {
    if code.contains("#![cfg(test)]") {
        return String::new();
    }
    const MARK: &str = "#[cfg(test)]";
    let mut out = String::new();
    let mut rest = code;
    while let Some(at) = rest.find(MARK) {
        out.push_str(&rest[..at]);
        rest = &rest[at + MARK.len()..];
        let mut level = 0;
        let end = rest.char_indices().find(|&(_, c)| {
            level += i32::from(matches!(c, '{' | '(' | '[')) - i32::from(matches!(c, '}' | ')' | ']'));
            level == 0 && matches!(c, '}' | ';')
        });
        rest = end.map_or("", |(at, _)| &rest[at + 1..]);
    }
    out + rest
}

mod the_checker {
    use super::*;

    #[test]
    fn refuses_an_import_that_runs_upward() {
        for (name, bad) in [
            ("units.rs", "use crate::store::Key;"),
            ("store/local.rs", "use crate::{units::ByteRange, volume::Volume};"),
            ("cache/mod.rs", "fn f() { crate::volume::registry::list(); }"),
            ("manifest/format.rs", "use super::super::volume;"),
            ("volume/mod.rs", "pub(crate) use crate::nbd::wire;"),
            ("nbd/wire.rs", "use crate::{\n    units::{ByteRange, Geometry},\n    server,\n};"),
            ("disk.rs", "use super::volume::Volume;"),
        ] {
            let found = judge_imports(name, bad);
            assert_eq!(found.len(), 1, "{name}: {bad}: {found:?}");
            assert!(found[0].contains("on a floor above it"), "{found:?}");
        }
    }

    #[test]
    fn refuses_strangers_even_on_lower_floors() {
        for (name, bad) in [
            ("nbd/mod.rs", "use crate::admin::Router;"),
            ("admin/exports.rs", "use crate::nbd::serve;"),
            ("nbd/transmission.rs", "let x = crate::cache::State::Dirty;"),
            ("admin/mod.rs", "use crate::{volume, clock::Clock};"),
            ("cache/meta.rs", "use crate::store::Key;"),
            ("manifest/mod.rs", "use crate::disk::Disk;"),
        ] {
            let found = judge_imports(name, bad);
            assert_eq!(found.len(), 1, "{name}: {bad}: {found:?}");
            assert!(found[0].contains("must not see"), "{found:?}");
        }
    }

    #[test]
    fn refuses_a_module_without_a_floor() {
        assert!(judge_imports("utils.rs", "")[0].contains("has no floor"));
    }

    #[test]
    fn takes_what_is_allowed_and_what_only_looks_like_an_import() {
        for (name, good) in [
            ("volume/fill.rs", "use crate::cache::Cache;\nuse crate::store::Store;\nuse super::Volume;"),
            ("nbd/mod.rs", "use crate::volume::registry::Registry; use super::super::units::ExportId;"),
            ("store/mod.rs", "//! See crate::volume.\n/* crate::nbd /* crate::admin */ crate::cli */"),
            (
                "store/mod.rs",
                "const A: &str = \"crate::nbd\"; const B: &str = r#\"crate::\"nbd\"#; const C: char = '\"';",
            ),
            ("store/mod.rs", "fn f<'a>(x: &'a str) -> &'a str { x } // crate::nbd"),
            ("store/mod.rs", "#[cfg(test)]\nmod tests { use crate::volume::Volume; fn f() {} }\nuse crate::units;"),
            ("store/mod.rs", "#[cfg(test)]\nuse crate::{volume};"),
            ("manifest/tests.rs", "use crate::volume::Volume;"),
            ("lib.rs", "pub use crate::nbd;"),
        ] {
            assert_eq!(judge_imports(name, good), Vec::<String>::new(), "{name}: {good}");
        }
    }

    #[test]
    fn still_reads_what_follows_a_test() {
        let code = "#[cfg(test)]\n#[path = \"x\"]\nmod tests { fn f() { g(['}']); } }\nuse crate::volume::Volume;";
        assert_eq!(judge_imports("store/mod.rs", code).len(), 1);
    }

    #[test]
    fn counts_code_and_nothing_else() {
        let text =
            "//! Words.\n\nfn f() {\n    // why\n    g(\"\n\n\");\n}\n\n#[cfg(test)]\nmod tests {\n    fn t() {}\n}\n";
        assert_eq!(code_lines(text), 4, "the call that spans lines has two with code");
        let long = "fn f() {}\n".repeat(MAX_LINES + 1);
        assert!(code_lines(&long) > MAX_LINES);
    }
}
