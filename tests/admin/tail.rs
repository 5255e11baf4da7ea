//! `tail`: events as they stand, from any place, without a consumer.

use crate::command::{Ended, command, on, run};
use crate::rig::{DEADLINE, Rig, STREAM, uuid};
use crate::support::nats::Nats;
use crate::support::process::Process;
use crate::support::wait::{eventually, secs, throughout};
use crossbeam_channel::bounded;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::thread;

fn seqs(ended: &Ended) -> Vec<u64> {
    let lines = ended.json_lines(0);
    lines
        .iter()
        .filter_map(|line| line["seq"].as_u64())
        .collect()
}

#[test]
fn an_event_is_printed_as_it_stands() {
    let rig = Rig::start();
    rig.commit_event(1, "a");
    rig.drain(&[]);
    let found = &rig.messages()[0];
    let position = found.header("Outbox-Position").expect("a position");
    let ended = on(&rig, &["tail"]);
    let text = ended.with(0);
    for part in [
        "[1] Subject: events.account.a Received: 20",
        &format!("\n  Nats-Msg-Id: {}\n", uuid(1)),
        &format!("\n  Outbox-Position: {position}\n"),
        "\n\n{\"n\":1}\n\n",
    ] {
        assert!(text.contains(part), "{part}:\n{text}");
    }
    let line = &on(&rig, &["tail", "--json"]).json_lines(0)[0];
    assert_eq!(line["stream"], STREAM);
    assert_eq!(line["subject"], "events.account.a");
    assert_eq!(line["headers"]["Nats-Msg-Id"], json!([uuid(1)]));
    assert_eq!(line["data"], "{\"n\":1}");
    let consumers = &rig.nats.client().stream_info(STREAM)["state"]["consumer_count"];
    assert_eq!(consumers, 0);
}

#[test]
fn it_begins_and_ends_where_it_is_told() {
    let nats = Nats::start();
    let mut client = nats.client();
    client.add_seed_stream();
    for n in 1..=9 {
        client.publish(
            &format!("events.{}.x", if n % 3 == 0 { "c" } else { "a" }),
            &[],
            b"{}",
        );
    }
    client.api(&format!("STREAM.MSG.DELETE.{STREAM}"), &json!({ "seq": 4 }));
    let messages = client.read_all(STREAM);
    let fifth = messages
        .iter()
        .find(|message| message.seq == 5)
        .expect("it is there");
    let (second, nano) = (fifth.time_ns / 1_000_000_000, fifth.time_ns % 1_000_000_000);
    let time = jiff_text(second, nano);
    let url = nats.url();
    for (args, expected) in [
        (&[][..], &[1, 2, 3, 5, 6, 7, 8, 9][..]),
        (&["-from", "start", "-count", "2"], &[1, 2]),
        (&["-from", "end"], &[]),
        (&["-from", "4"], &[5, 6, 7, 8, 9]),
        (&["-from", "8"], &[8, 9]),
        (&["-from", "100"], &[]),
        (&["-from", &time], &[5, 6, 7, 8, 9]),
        (&["-from", "1h", "-count=1"], &[1]),
        (&["-from", "2099-01-01T00:00:00Z"], &[]),
        (&["-count", "0"], &[]),
        (&["-subject", "events.c.>"], &[3, 6, 9]),
        (&["-subject", "events.*.x", "-from=9"], &[9]),
        (&["-subject", "events.c.x", "-from", &time], &[6, 9]),
        (&["-subject", "events.none"], &[]),
    ] {
        let all = [&["tail", "-json", "-nats", &url], args].concat();
        assert_eq!(seqs(&run(&all, &[])), expected, "{args:?}");
    }
    let ended = run(
        &[
            "tail",
            "-subject",
            "other.>",
            "-db=host=unused",
            "-nats",
            &url,
        ],
        &[],
    );
    assert_eq!(ended.code, 78, "{ended:?}");
    assert!(ended.stderr.contains("no stream captures it"), "{ended:?}");
    let ended = run(&["tail", "-nats", "127.0.0.1:1"], &[]);
    assert_eq!(ended.code, 69, "{ended:?}");
}

/// RFC 3339, as `date` prints it.
fn jiff_text(second: u64, nano: u64) -> String {
    let time = jiff::Timestamp::new(second as i64, nano as i32).expect("a time");
    time.to_string()
}

#[test]
fn several_streams_are_merged_by_time() {
    let nats = Nats::start();
    let mut client = nats.client();
    client.add_stream("A", &["events.a.>"]);
    client.add_stream("B", &["events.b.>"]);
    for subject in ["events.a.1", "events.b.1", "events.b.2", "events.a.2"] {
        client.publish(subject, &[], b"{}");
    }
    let ended = run(&["tail", "-nats", &nats.url()], &[]);
    let heads: Vec<&str> = (ended.with(0).lines())
        .filter_map(|line| {
            line.split(" Received")
                .next()
                .filter(|head| head.starts_with('['))
        })
        .collect();
    assert_eq!(
        heads,
        [
            "[A 1] Subject: events.a.1",
            "[B 1] Subject: events.b.1",
            "[B 2] Subject: events.b.2",
            "[A 2] Subject: events.a.2"
        ]
    );
}

#[test]
fn it_follows_also_over_a_restart_of_the_server() {
    let nats = Nats::start();
    nats.client().add_seed_stream();
    nats.client().publish("events.a", &[], b"0");
    let url = nats.url();
    let args = [
        "tail",
        "-follow",
        "-from",
        "end",
        "-json",
        "-db=host=unused",
        "-nats",
        &url,
    ];
    let mut command = command(&args, &[]);
    command.stdout(Stdio::piped()).stderr(Stdio::null());
    let mut process = Process::spawn("tail", &mut command);
    let stdout = process.child().stdout.take().expect("stdout is piped");
    let lines = Arc::new(Mutex::new(Vec::<String>::new()));
    let collector = thread::spawn({
        let lines = lines.clone();
        move || {
            for line in BufReader::new(stdout).lines() {
                lines.lock().unwrap().push(line.expect("UTF-8"));
            }
        }
    });
    // it began at some time between its start and its first line
    eventually("the first event", DEADLINE, || {
        nats.client().publish("events.a", &[], b"1");
        !lines.lock().unwrap().is_empty()
    });
    nats.stop();
    // longer than the client library's own attempts to connect again
    throughout("tail", secs(3), || process.try_exit().is_none());
    nats.start_again();
    nats.client().publish("events.b", &[], b"2");
    let data = |line: &String| serde_json::from_str::<Value>(line).expect("JSON")["data"].clone();
    eventually("the event after the restart", DEADLINE, || {
        lines.lock().unwrap().last().map(data) == Some(json!("2"))
    });
    process.kill();
    collector.join().expect("the lines are read");
    let found: Vec<Value> = lines.lock().unwrap().iter().map(data).collect();
    let (last, before) = found.split_last().expect("lines");
    assert_eq!(last, "2");
    assert!(before.iter().all(|data| data == "1"), "{found:?}");
}

#[test]
fn a_reader_that_goes_away_ends_it_quietly() {
    let nats = Nats::start();
    let mut client = nats.client();
    client.add_seed_stream();
    client.fill("events.a", (1..=2000).map(|n| n.to_string().into()));
    let mut command = command(&["tail", "-nats", &nats.url()], &[]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = Process::spawn("tail", &mut command);
    let stdout = process.child().stdout.take().expect("stdout is piped");
    let mut stderr = process.child().stderr.take().expect("stderr is piped");
    let (sender, first) = bounded(1);
    // the rest, more than a pipe holds, is not wanted
    let reader = thread::spawn(move || sender.send(BufReader::new(stdout).lines().next()));
    let first = first.recv_timeout(DEADLINE).expect("a line in time");
    let first = first.expect("a line").expect("UTF-8");
    assert!(first.starts_with("[1] Subject: events.a"), "{first}");
    reader.join().expect("it reads").expect("it is heard");
    assert!(process.wait_exit(DEADLINE).success());
    let mut said = String::new();
    stderr.read_to_string(&mut said).expect("UTF-8");
    assert_eq!(said, "");
}
