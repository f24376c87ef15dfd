//! `docs/` says only what is so: every test and every file that it names exists.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn all_source() -> String {
    let mut text = String::new();
    let mut folders = vec![root().join("src"), root().join("tests")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                text += &fs::read_to_string(path).unwrap();
            }
        }
    }
    text
}

/// What stands between backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// The tests a document names: claims, that is at least three words in snake case.
fn named_tests(text: &str) -> Vec<&str> {
    let claim = |name: &&str| {
        name.matches('_').count() >= 2
            && name.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'_')
    };
    quoted(text).filter(claim).collect()
}

/// The documents that name tests, and at least how many.
const NAME_TESTS: [(&str, usize); 3] = [("docs/semantics.md", 20), ("docs/protocol.md", 40), ("docs/testing.md", 20)];

#[test]
fn every_test_that_a_document_names_exists() {
    let source = all_source();
    for (document, least) in NAME_TESTS {
        let text = fs::read_to_string(root().join(document)).unwrap();
        let names = named_tests(&text);
        assert!(names.len() >= least, "{document} names only {} tests", names.len());
        let missing: Vec<_> = names.iter().filter(|name| !source.contains(&format!("fn {name}("))).collect();
        assert!(missing.is_empty(), "{document} names tests that do not exist: {missing:#?}");
    }
}

#[test]
fn every_row_of_the_support_table_names_its_test() {
    let document = fs::read_to_string(root().join("docs/protocol.md")).unwrap();
    let rows: Vec<&str> = document
        .lines()
        .filter(|line| line.starts_with("| ") && !line.contains("---") && !line.contains("| ours |"))
        .collect();
    assert!(rows.len() >= 40, "only {} rows", rows.len());
    for row in rows {
        let cells: Vec<&str> = row.trim_matches('|').split('|').collect();
        assert_eq!(cells.len(), 6, "{row}");
        assert_eq!(named_tests(cells[5]).len(), 1, "{row}");
    }
}

#[test]
fn every_promise_names_what_holds_it() {
    let document = fs::read_to_string(root().join("docs/semantics.md")).unwrap();
    let promises: Vec<&str> = document.split("\n**").skip(1).collect();
    assert!(promises.len() >= 11);
    for promise in promises {
        let title = promise.split("**").next().unwrap();
        assert!(promise.contains("Held by "), "{title:?} is held by no test");
    }
}

#[test]
fn every_file_of_the_code_map_exists() {
    let document = fs::read_to_string(root().join("docs/architecture.md")).unwrap();
    let is_file = |name: &&str| name.ends_with(".rs") && !name.contains('*');
    let named: Vec<&str> = quoted(&document).filter(is_file).collect();
    assert!(named.len() >= 20, "only {} files are named", named.len());
    let there = |name: &str| Path::new(&root()).join("src").join(name).exists() || root().join(name).exists();
    let missing: Vec<_> = named.into_iter().filter(|name| !there(name)).collect();
    assert!(missing.is_empty(), "docs/architecture.md names files that do not exist: {missing:#?}");
}

#[test]
fn the_code_map_leaves_no_file_out() {
    let document = fs::read_to_string(root().join("docs/architecture.md")).unwrap();
    let named: Vec<&str> = quoted(&document).collect();
    let mut unnamed = Vec::new();
    let mut folders = vec![root().join("src")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(root().join("src")).unwrap().to_str().unwrap();
            let is_code = name.ends_with(".rs") && !name.ends_with("tests.rs") && name != "lib.rs";
            if path.is_dir() {
                folders.push(path);
            } else if is_code && !named.contains(&name) {
                unnamed.push(name.to_owned());
            }
        }
    }
    assert!(unnamed.is_empty(), "docs/architecture.md says nothing of {unnamed:#?}");
}

#[test]
fn links_lead_to_files_that_exist() {
    let documents = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"].map(PathBuf::from).into_iter();
    let docs =
        fs::read_dir(root().join("docs")).unwrap().map(|entry| Path::new("docs").join(entry.unwrap().file_name()));
    for document in documents.chain(docs) {
        let text = fs::read_to_string(root().join(&document)).unwrap();
        let linked = text.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next());
        for target in linked.filter(|target| !target.is_empty() && !target.contains("://")) {
            let path = root().join(document.parent().unwrap()).join(target);
            assert!(path.exists(), "{} links to {target}, which does not exist", document.display());
        }
        for target in quoted(&text).filter(|name| name.starts_with("docs/") && name.ends_with(".md")) {
            assert!(root().join(target).exists(), "{} names {target}, which does not exist", document.display());
        }
    }
}

#[test]
fn a_name_in_the_text_is_found_and_a_field_is_not_taken_for_one() {
    let text = "Held by `a_test_named_so`, `volume.json`, `image_size`, `TODO_A_B`.";
    assert_eq!(named_tests(text), ["a_test_named_so"]);
}
