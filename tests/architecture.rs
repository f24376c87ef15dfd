//! The house, as a test: imports run downward only, what is hidden stays hidden, and a file is one thought.
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
    ("sabotage", 0),
    ("metrics", 0),
    ("units", 0),
    ("sync", 0),
    ("slices", 0),
    ("background", 0),
    ("net", 0),
];

/// What a module must not see even where it stands above it: the front ends talk to volumes alone, and `volume` is the
/// only place where cache and store meet.
const HIDDEN: &[(&str, &[&str])] = &[
    ("nbd", &["admin", "cache", "manifest", "store", "disk", "clock"]),
    ("admin", &["nbd", "cache", "manifest", "store", "disk", "clock"]),
    ("cache", &["store"]),
    ("manifest", &["store", "disk", "clock"]),
];

/// What a module may see of one that is hidden from it: the names of objects are pure text.
const SHOWN: &[(&str, &[&str])] = &[("manifest", &["store::keys", "store::Key"])];

/// The most lines of code a file may have; blank lines, comments and tests do not count.
const MAX_LINES: usize = 600;

#[test]
fn imports_run_downward_and_hidden_modules_stay_hidden() {
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
        .map(|file| (&file.name, code_lines(&file.name, &file.text)))
        .filter(|&(_, lines)| lines > MAX_LINES)
        .map(|(name, lines)| {
            format!("src/{name} has {lines} lines of code, over {MAX_LINES}: give a part its own file")
        })
        .collect();
    assert!(too_long.is_empty(), "\n{}", too_long.join("\n"));
}

#[test]
fn what_the_checker_of_interleavings_runs_blocks_by_the_locks_of_sync_alone() {
    let checked = |name: &str| name.starts_with("cache/") || name == "volume/order.rs";
    let mut seen = 0;
    for file in sources().iter().filter(|file| checked(&file.name)) {
        seen += 1;
        let code = production_code(&file.name, &file.text);
        let others = code.split("std::sync::").skip(1).filter(|rest| !rest.starts_with("Arc;")).count();
        let unseen = others > 0 || code.contains("parking_lot") || code.contains("thread::");
        assert!(
            !unseen,
            "src/{} has locks or atomics that the checker does not see: take those of src/sync.rs",
            file.name
        );
    }
    assert!(seen > 5, "the cache was not found");
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
    let hidden = row(HIDDEN, module);
    let shown = row(SHOWN, module);
    let code = production_code(name, text);
    let mut wrong = Vec::new();
    for path in root_paths(&code, depth(name)) {
        let target = path.split("::").next().unwrap_or_default();
        if floor(target).is_some_and(|floor| floor > own_floor) {
            wrong.push(format!("src/{name}: {module} imports crate::{path}, which is on a floor above it"));
        } else if hidden.contains(&target) && !shown.iter().any(|allowed| is_below(&path, allowed)) {
            wrong.push(format!("src/{name}: {module} must not see crate::{path}"));
        }
    }
    wrong.dedup();
    wrong
}

fn row(table: &[(&str, &'static [&'static str])], module: &str) -> &'static [&'static str] {
    table.iter().find(|(from, _)| *from == module).map_or(&[], |&(_, to)| to)
}

fn is_below(path: &str, prefix: &str) -> bool {
    path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

fn floor(module: &str) -> Option<u8> {
    FLOORS.iter().find(|(name, _)| *name == module).map(|&(_, floor)| floor)
}

/// How many `super` lead from a file's module to the root of the crate.
fn depth(name: &str) -> usize {
    name.trim_end_matches(".rs").trim_end_matches("/mod").split('/').count()
}

fn code_lines(name: &str, text: &str) -> usize {
    production_code(name, text).lines().filter(|line| !line.trim().is_empty()).count()
}

fn production_code(name: &str, text: &str) -> String {
    let is_test_file = name.ends_with("/tests.rs") || name.contains("/tests/");
    if is_test_file { String::new() } else { without_tests(&without_comments_and_strings(text)) }
}

/// Every absolute path, groups taken apart: `crate::store::{Key, keys::ExportRoot}` is two.
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
            take_tree(&tokens, next, "", &mut found);
        }
        at += 1;
    }
    found
}

/// Reads a path or a group of them, each to go behind `prefix`; returns the position of the token behind it.
fn take_tree(tokens: &[&str], at: usize, prefix: &str, found: &mut Vec<String>) -> usize {
    let behind = |name: &str| if prefix.is_empty() { name.to_owned() } else { format!("{prefix}::{name}") };
    if !is(tokens, at, "{") {
        let Some(&name) = tokens.get(at) else { return at };
        let path = behind(name);
        if is(tokens, at + 1, "::") {
            return take_tree(tokens, at + 2, &path, found);
        }
        found.push(path);
        return at + 1;
    }
    let mut next = at + 1;
    while next < tokens.len() && !is(tokens, next, "}") {
        if is(tokens, next, ",") {
            next += 1;
            continue;
        }
        next = take_tree(tokens, next, prefix, found);
        // A new name (`as other`) is nothing of the house.
        while next < tokens.len() && !is(tokens, next, ",") && !is(tokens, next, "}") {
            next += 1;
        }
    }
    next + 1
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
    fn refuses_what_is_hidden_even_on_a_lower_floor() {
        for (name, bad) in [
            ("nbd/mod.rs", "use crate::admin::Router;"),
            ("admin/exports.rs", "use crate::nbd::serve;"),
            ("nbd/transmission.rs", "let x = crate::cache::State::Dirty;"),
            ("admin/mod.rs", "use crate::{volume, clock::Clock};"),
            ("cache/meta.rs", "use crate::store::Key;"),
            ("manifest/mod.rs", "use crate::disk::Disk;"),
            ("manifest/mod.rs", "use crate::store::Store;"),
            ("manifest/mod.rs", "use crate::store;"),
            ("manifest/head.rs", "use crate::store::{Key, keys::{self, ExportRoot}, Version as V};"),
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
            ("manifest/mod.rs", "use crate::store::{Key, keys::{self, ExportRoot as Root}};"),
            ("manifest/mod.rs", "fn f() -> crate::store::Key { crate::store::keys::g::<crate::units::ExportId>() }"),
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
        assert_eq!(code_lines("a.rs", text), 4, "the call that spans lines has two with code");
        let long = "fn f() {}\n".repeat(MAX_LINES + 1);
        assert!(code_lines("a.rs", &long) > MAX_LINES);
        assert_eq!(code_lines("a/tests.rs", &long), 0);
    }
}
