//! The book's examples are run: what a page prints is what the program prints.
//!
//! In each fenced block marked `console`, lines that begin with `$ ` are commands and the lines below them their output
//! (standard output and error together). `…` matches anything within a line, and any number of lines where it stands alone. A
//! page's blocks run in order, in one network namespace and one empty folder of the page's own; `$GUEST` is the test guest.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use dunlin_tests::{Netns, dunlin};

struct Example {
    command: String,
    expected: Vec<String>,
}

fn examples(page: &str) -> Vec<Example> {
    let mut examples: Vec<Example> = Vec::new();
    let (mut inside, mut runs) = (false, false);
    for line in page.lines() {
        if let Some(info) = line.strip_prefix("```") {
            inside = !inside;
            runs = inside && info == "console";
        } else if runs {
            match (line.strip_prefix("$ "), examples.last_mut()) {
                (Some(command), _) => examples.push(Example { command: command.to_owned(), expected: Vec::new() }),
                (None, Some(example)) => example.expected.push(line.to_owned()),
                (None, None) => panic!("output without a command: {line}"),
            }
        }
    }
    assert!(!inside, "a block is not closed");
    examples
}

/// Whether `line` reads as `pattern`, in which `…` stands for anything.
fn matches(pattern: &str, line: &str) -> bool {
    let Some((before, after)) = pattern.split_once('…') else { return pattern.trim_end() == line.trim_end() };
    let Some(rest) = line.strip_prefix(before) else { return false };
    (0..=rest.len()).filter(|at| rest.is_char_boundary(*at)).any(|at| matches(after, &rest[at..]))
}

fn all_match(patterns: &[String], lines: &[&str]) -> bool {
    let Some((pattern, others)) = patterns.split_first() else { return lines.is_empty() };
    if pattern == "…" {
        return (0..=lines.len()).any(|skipped| all_match(others, &lines[skipped..]));
    }
    lines.split_first().is_some_and(|(line, rest)| matches(pattern, line) && all_match(others, rest))
}

fn pages(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(pages(&path));
        } else if path.extension().is_some_and(|extension| extension == "md") {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// Ends what a page started and did not end, also when it failed half-way: everything in its own namespace.
struct Leftovers<'a>(&'a Netns);

impl Drop for Leftovers<'_> {
    fn drop(&mut self) {
        for pid in self.0.inmates().unwrap_or_default() {
            if let Some(pid) = rustix::process::Pid::from_raw(pid as i32) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
    }
}

#[test]
fn examples_print_what_the_book_says() {
    let book = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/src");
    let binary = PathBuf::from(dunlin().get_program());
    let path = format!("{}:{}", binary.parent().unwrap().display(), std::env::var("PATH").unwrap_or_default());
    let guest = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest/target/release/dunlin-guest");
    assert!(guest.is_file(), "run `cargo build --release` in tests/guest first");
    let mut commands = 0;
    for page in pages(&book) {
        let examples = examples(&fs::read_to_string(&page).unwrap());
        if examples.is_empty() {
            continue;
        }
        let netns = Netns::new("docs").unwrap();
        let folder = tempfile::tempdir().unwrap();
        let _rest = Leftovers(&netns);
        for Example { command, expected } in examples {
            let mut shell = Command::new("bash");
            shell.args(["-c", &format!("{{ {command}\n}} 2>&1")]).env("PATH", &path).env("GUEST", &guest);
            shell.current_dir(&folder);
            let output = netns.output(&mut shell).unwrap();
            let text = String::from_utf8(output.stdout).unwrap();
            let lines: Vec<&str> = text.lines().collect();
            assert!(
                all_match(&expected, &lines) && output.status.success(),
                "{}: `{command}` ({})\nprinted:\n{text}\nthe book says:\n{}",
                page.display(),
                output.status,
                expected.join("\n")
            );
            commands += 1;
        }
    }
    assert!(commands > 10, "only {commands} commands were found");
}

#[test]
fn every_page_is_in_the_summary_and_every_link_leads_somewhere() {
    let book = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/src");
    let summary = fs::read_to_string(book.join("SUMMARY.md")).unwrap();
    for page in pages(&book) {
        let name = page.strip_prefix(&book).unwrap().to_str().unwrap();
        assert!(name == "SUMMARY.md" || summary.contains(&format!("({name})")), "{name} is not in the summary");
        let text = fs::read_to_string(&page).unwrap();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let target = page.parent().unwrap().join(link.split('#').next().unwrap());
            assert!(link.is_empty() || link.contains("://") || target.exists(), "{name} links to {link}");
        }
    }
}

#[test]
fn an_ellipsis_matches_anything_within_a_line() {
    assert!(matches("a … c", "a b c") && matches("a…", "a") && matches("…c", "abc") && matches("x  ", "x"));
    let patterns = ["a".to_owned(), "…".to_owned(), "b…".to_owned()];
    assert!(all_match(&patterns, &["a", "b"]) && all_match(&patterns, &["a", "x", "y", "bc"]));
    assert!(!all_match(&patterns, &["a"]) && !all_match(&patterns, &["a", "b", "x"]));
    assert!(!matches("a … c", "a b d") && !matches("a", "ab") && !matches("…b…b", "ab"));
}
