//! The command line of the real binary: what it prints, where, and the exit code. No server is reached.

mod support;

use argh::ArgsInfo;
use jetstream_outbox::cli::Cli;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use support::command::{DEADLINE, command, run};
use support::process::Process;

/// Flags that start the relay towards closed ports and end it soon.
const CLOSED: [&str; 7] = [
    "-db",
    "host=127.0.0.1 port=1 dbname=d",
    "-nats",
    "127.0.0.1:1",
    "-max-outage",
    "1s",
    "-drain",
];

fn start_line(args: &[&str], env: &[(&str, &str)]) -> String {
    let ended = run(&[&CLOSED, args].concat(), env);
    let mut lines = ended.stderr.lines();
    let found = lines.find(|line| line.contains("starting"));
    found.unwrap_or_else(|| panic!("{}", ended.stderr)).into()
}

const VERSION: &str = concat!("jetstream-outbox ", env!("CARGO_PKG_VERSION"), "\n");

#[test]
fn version_and_help_go_to_standard_output() {
    for (args, expect) in [
        (&["--version"][..], VERSION),
        (&["-version"], VERSION),
        (&["--help"], "Usage: jetstream-outbox [command] [flags]\n"),
        (&["-help"], "Usage: jetstream-outbox [command] [flags]\n"),
        (
            &["check", "--help"],
            "Usage: jetstream-outbox check [flags]\n",
        ),
        (&["-h"], "Usage: jetstream-outbox [command] [flags]\n"),
    ] {
        let ended = run(args, &[]);
        assert_eq!((ended.code, ended.stderr.as_str()), (0, ""));
        assert!(ended.stdout.starts_with(expect), "{}", ended.stdout);
    }
}

#[test]
fn help_lists_every_flag_with_its_default() {
    let help = run(&["--help"], &[]).stdout;
    let (flags, _) = help.split_once("\n\nExamples:").expect("examples follow");
    let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    // each begins a line, and goes on further in
    let listed: Vec<String> = flags.split("\n  --").skip(1).map(words).collect();
    let flags = Cli::get_args_info().flags;
    assert_eq!(listed.len(), flags.len(), "{listed:#?}");
    for flag in flags.iter().map(|flag| flag.long.trim_start_matches('-')) {
        let of_it = |text: &&String| text.split([' ', ',']).next() == Some(flag);
        let own = listed.iter().find(of_it).expect(flag);
        let has_value = !["help", "version"].contains(&flag);
        assert_eq!(own.contains("(default"), has_value, "{own}");
    }
}

#[test]
fn usage_errors_name_the_flag_and_end_with_what_to_do() {
    for (args, env, code, expect) in [
        (&[][..], &[][..], 64, &["-db", "pass -db postgres://"][..]),
        (&["-no-such"], &[], 64, &["--no-such", "--help"]),
        (&["-db"], &[], 64, &["--db needs a value", "--help"]),
        (&["-drain=1"], &[], 64, &["--drain", "--help"]),
        (
            &["-db=host=h", "-inflight", "0"],
            &[],
            64,
            &["-inflight", "\"0\"", "correct -inflight"],
        ),
        (
            &["--db=host=h", "--slot=A"],
            &[],
            64,
            &["-slot", "\"A\"", "correct -slot"],
        ),
        (
            &["-db=host=h"],
            &[("JETSTREAM_OUTBOX_HOLD_BACK", "soon")],
            64,
            &["\"soon\"", "correct JETSTREAM_OUTBOX_HOLD_BACK"],
        ),
        (
            &["-db=host=h", "-creds=/nonexistent"],
            &[],
            78,
            &["/nonexistent", "correct -creds"],
        ),
    ] {
        let ended = run(args, env);
        assert_eq!(ended.code, code, "{args:?}: {}", ended.stderr);
        assert_eq!(ended.stdout, "", "{args:?}");
        for part in expect {
            assert!(ended.stderr.contains(part), "{args:?}: {}", ended.stderr);
        }
        let last_line = ended.stderr.lines().last().unwrap();
        assert!(last_line.contains(expect[expect.len() - 1]), "{last_line}");
    }
}

#[test]
fn both_spellings_reach_the_relay() {
    for args in [
        &["-prefix", "shop", "-inflight", "7"][..],
        &["--prefix", "shop", "--inflight", "7"],
        &["-prefix=shop", "-inflight=7"],
        &["--prefix=shop", "--inflight=7"],
    ] {
        let line = start_line(args, &[]);
        assert!(
            line.contains(" prefix=shop ") && line.contains(" inflight=7 "),
            "{line}"
        );
    }
}

#[test]
fn a_flag_beats_the_environment_which_beats_the_default() {
    let env = [("JETSTREAM_OUTBOX_PREFIX", "from-env")];
    for (args, env, expect) in [
        (&[][..], &[][..], " prefix=events "),
        (&[], &env, " prefix=from-env "),
        (&["-prefix", "from-flag"], &env, " prefix=from-flag "),
    ] {
        let line = start_line(args, env);
        assert!(line.contains(expect), "{line}");
    }
}

#[test]
fn each_log_line_is_one_object_with_log_format_json() {
    let ended = run(&[&CLOSED[..], &["-log-format", "json"]].concat(), &[]);
    assert!(!ended.stderr.is_empty());
    for line in ended.stderr.lines() {
        let object: serde_json::Value = serde_json::from_str(line).expect(line);
        for key in ["time", "level", "msg"] {
            assert!(object[key].is_string(), "{line}");
        }
    }
}

#[test]
fn secrets_are_never_printed() {
    let url = "postgres://u:sekret@127.0.0.1:1/d";
    let pairs = "host=127.0.0.1 port=1 dbname=d password=sekret";
    for (args, env) in [
        (&["-db", url][..], &[][..]),
        (&["-db", pairs], &[]),
        (&["-db", pairs, "-nats", "nats://u:sekret@127.0.0.1:1"], &[]),
        (&["-db", url, "-nats", "sekret@127.0.0.1:1"], &[]),
        (&["-db", url, "-db", url, "-nats=sekret@http://x"], &[]),
        (&[url], &[]),
        (&["-dbx", url], &[]),
        (&[&format!("-db{url}")], &[]),
        (&[], &[("JETSTREAM_OUTBOX_DB", url)]),
        (&["-db="], &[("PGPASSWORD", "sekret"), ("PGPORT", "1")]),
    ] {
        let args = [&["-max-outage=1s", "-drain", "-logging=debug"], args].concat();
        let ended = run(&args, env);
        assert!(!ended.stderr.is_empty(), "{args:?}");
        for text in [ended.stdout, ended.stderr] {
            assert!(!text.contains("sekret"), "{args:?}: {text}");
        }
    }
}

#[test]
fn nobody_reading_standard_error_does_not_hold_the_program_up() {
    for closed in [true, false] {
        let (mut stderr, reader) = UnixStream::pair().unwrap();
        let reader = (!closed).then_some(reader);
        if reader.is_some() {
            stderr.set_nonblocking(true).unwrap();
            while stderr.write(&[b'x'; 4096]).is_ok() {}
            stderr.set_nonblocking(false).unwrap();
        }
        let mut command = command(&CLOSED, &[]);
        command.stdout(Stdio::null()).stderr(OwnedFd::from(stderr));
        let mut process = Process::spawn("the program", &mut command);
        let status = process.wait_exit(DEADLINE);
        assert!(status.code().is_some(), "closed: {closed}: {status}");
    }
}

/// With the shell that every machine of these tests has; the other scripts come from the same definitions.
#[test]
fn bash_completes_commands_and_their_flags() {
    let program = env!("CARGO_BIN_EXE_jetstream-outbox");
    let complete = |words: &str| {
        let script = format!(
            "source <('{program}' completions bash); COMP_WORDS=(jetstream-outbox {words}); \
             COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _jetstream-outbox; echo \"${{COMPREPLY[@]}}\""
        );
        let output = Command::new("bash")
            .args(["-c", &script])
            .output()
            .expect("run bash");
        assert!(
            output.status.success() && output.stderr.is_empty(),
            "{output:?}"
        );
        String::from_utf8(output.stdout)
            .expect("flags are ASCII")
            .trim()
            .to_string()
    };
    assert_eq!(complete("--max-o"), "--max-outage");
    assert_eq!(
        complete("status --max"),
        "--max-lag-bytes --max-lag-seconds"
    );
    assert_eq!(complete("st"), "status");
    assert_eq!(complete("--db ''"), "", "a value is the operator's");
    let ended = run(&["completions", "tcsh"], &[]);
    assert_eq!(ended.code, 64);
    assert!(
        ended.stderr.contains("bash, zsh and fish"),
        "{}",
        ended.stderr
    );
}

/// Where groff is installed, which warns of what is no macro.
#[test]
fn the_manual_page_is_one() {
    let page = run(&["man"], &[]);
    assert_eq!((page.code, page.stderr.as_str()), (0, ""));
    assert!(page.stdout.starts_with(".TH JETSTREAM\\-OUTBOX 1 "));
    assert_eq!(run(&["man", "-x"], &[]).code, 64);
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("page");
    std::fs::write(&path, &page.stdout).expect("write the page");
    let output = Command::new("groff")
        .args(["-man", "-Tascii", "-ww", "-z"])
        .arg(&path)
        .output();
    let Ok(output) = output else {
        return eprintln!("skipped: groff is not installed");
    };
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.is_empty(), "{said}");
}
