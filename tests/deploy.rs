//! The files under scripts/deploy, against the program and, where it is installed, against systemd's own reading.

use jetstream_outbox::exit::Exit;
use std::fs;
use std::process::Command;

const UNIT: &str = include_str!("../scripts/deploy/jetstream-outbox.service");
const TEMPLATE: &str = include_str!("../scripts/deploy/jetstream-outbox@.service");
const CRON: &str = include_str!("../scripts/deploy/cron");
const README: &str = include_str!("../README.md");
const CONFIGURATION: &str = include_str!("../src/manual/02_configuration.md");

#[test]
fn what_a_restart_cannot_mend_is_not_restarted() {
    let codes = UNIT
        .lines()
        .find_map(|line| line.strip_prefix("RestartPreventExitStatus="));
    let for_good =
        [Exit::Usage, Exit::Data, Exit::Configuration].map(|exit| (exit as u8).to_string());
    assert_eq!(codes, Some(for_good.join(" ").as_str()));
    let busy = format!("[ $? = {} ]", Exit::SlotInUse as u8);
    assert!(CRON.contains(&busy), "{busy}");
}

#[test]
fn the_template_is_the_unit_but_for_its_names() {
    let [unit, template] = [UNIT, TEMPLATE].map(|text| {
        let start = text.find("[Unit]").expect("it has sections");
        text[start..].lines().collect::<Vec<_>>()
    });
    assert_eq!(unit.len(), template.len());
    let lines = unit.iter().zip(&template);
    let differ: Vec<_> = lines.filter(|(one, other)| one != other).collect();
    let named = ["Description=", "EnvironmentFile=", "LoadCredential="];
    assert_eq!(differ.len(), named.len(), "{differ:?}");
    for ((one, other), name) in differ.iter().zip(named) {
        assert!(one.starts_with(name) && other.starts_with(name) && other.contains("%i"));
    }
}

/// The bound of the unit follows from the README's.
#[test]
fn the_memory_that_the_unit_allows_is_three_times_what_is_promised() {
    let number = |text: &str, before: &str, after: &str| -> u32 {
        let start = text.find(before).expect("it is there") + before.len();
        let rest = &text[start..];
        let end = rest.find(after).expect("it ends");
        rest[..end].parse().expect("a number")
    };
    let promised = number(README, "at most **", " MB** resident");
    assert_eq!(number(UNIT, "\nMemoryMax=", "M\n"), 3 * promised);
}

#[test]
fn their_variables_are_the_programs() {
    for text in [UNIT, TEMPLATE, CRON] {
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let variables: Vec<_> = words
            .filter(|word| word.starts_with("JETSTREAM_OUTBOX_"))
            .collect();
        assert!(variables.len() > 1, "{text}");
        for variable in variables {
            let row = format!("| `{variable}` |");
            assert!(CONFIGURATION.contains(&row), "{variable}");
        }
    }
}

/// Needs systemd's tools; a machine without them has no use for the unit either.
#[test]
fn systemd_understands_the_unit_and_finds_it_well_confined() {
    let analyze = |args: &[&str]| Command::new("systemd-analyze").args(args).output();
    if analyze(&["--version"]).is_err() {
        return println!("systemd-analyze is not installed: the unit is not looked at");
    }
    let folder = tempfile::tempdir().expect("create a temporary folder");
    let path_of = |name: &str, unit: &str| {
        let path = folder.path().join(name);
        // it must find the program
        let unit = unit.replace("/usr/local/bin/jetstream-outbox", "/bin/true");
        fs::write(&path, unit).expect("write the unit");
        path.to_str().expect("a path of ours").to_string()
    };
    let unit = path_of("jetstream-outbox.service", UNIT);
    let template = path_of("jetstream-outbox@.service", TEMPLATE);
    // its manual pages need not be installed here
    let verify = &["verify", "--man=no"][..];
    let security = &["security", "--offline=true", "--threshold=20"][..];
    for (args, path) in [(verify, &unit), (security, &unit), (verify, &template)] {
        let output = analyze(&[args, &[path]].concat()).expect("it ran before");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success() && said.trim().is_empty(),
            "{args:?}: {said}"
        );
    }
}
