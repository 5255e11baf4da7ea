//! A small synchronous NATS client for the tests: sees what is in a stream without the relay's own code.
//!
//! One blocking socket, no thread. It knows CONNECT, SUB, PUB, HPUB, MSG, HMSG, PING and PONG
//! (<https://docs.nats.io/reference/reference-protocols/nats-protocol>) and as much of the JetStream API as
//! tests ask for. No TLS: a server that demands it can be given `allow_non_tls: true`.

use base64::prelude::{BASE64_STANDARD, Engine as _};
use serde_json::{Value, json};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// How long one answer may take on a busy machine before the server counts as gone.
const ANSWER_DEADLINE: Duration = Duration::from_secs(10);

/// How much of a stream one request asks for: few enough round trips, and under the 64 MiB at which the
/// server cuts off a client that reads slowly.
const FETCH_MESSAGES: u64 = 5_000;
const FETCH_BYTES: u64 = 16 << 20;

/// How many messages [`NatsClient::fill`] has unacknowledged: the server refuses what exceeds its queue.
const FILL_WINDOW: usize = 1_000;

/// Headers in wire order.
pub type Headers = Vec<(String, String)>;

/// What the server delivered.
#[derive(Debug, Clone)]
pub struct Message {
    /// The subject it was delivered under.
    pub subject: String,
    /// Where an answer is to go; for a message from a consumer, its place in the stream.
    pub reply: Option<String>,
    /// The status of a message without content, such as 404 or 503; 0 for an ordinary one.
    pub status: u16,
    /// Headers in wire order.
    pub headers: Headers,
    /// The payload.
    pub body: Vec<u8>,
}

/// A message as a stream holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamMessage {
    /// The stream's sequence number, from 1.
    pub seq: u64,
    /// When the server stored it, by its clock: nanoseconds since 1970.
    pub time_ns: u64,
    /// The subject it was published under.
    pub subject: String,
    /// Headers in wire order.
    pub headers: Headers,
    /// The payload.
    pub body: Vec<u8>,
}

impl StreamMessage {
    /// A header's value, the first of that name.
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut headers = self.headers.iter();
        headers.find_map(|(key, value)| (key == name).then_some(value.as_str()))
    }

    /// The `Nats-Msg-Id`, or nothing.
    pub fn id(&self) -> &str {
        self.header("Nats-Msg-Id").unwrap_or_default()
    }

    /// The payload as text.
    #[track_caller]
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("the payload is UTF-8")
    }
}

/// A connection. The methods named `try_…` answer an error when the server does not answer; the others
/// panic with it.
pub struct NatsClient {
    input: BufReader<TcpStream>,
    output: TcpStream,
    next_inbox: u64,
    inbox: String,
    answer_deadline: Duration,
}

fn broken(what: impl Into<String>) -> io::Error {
    io::Error::other(what.into())
}

impl NatsClient {
    /// Connects to `127.0.0.1:PORT`. `options` go into CONNECT: `json!({})`, `json!({"user": …, "pass": …})`.
    pub fn try_connect(port: u16, options: &Value) -> io::Result<NatsClient> {
        NatsClient::try_connect_within(port, options, ANSWER_DEADLINE)
    }

    /// The same with a deadline of the caller's own for every answer, for a server that may not give one.
    pub fn try_connect_within(
        port: u16,
        options: &Value,
        answer_deadline: Duration,
    ) -> io::Result<NatsClient> {
        let address = ([127, 0, 0, 1], port).into();
        let output = TcpStream::connect_timeout(&address, answer_deadline)?;
        output.set_read_timeout(Some(answer_deadline))?;
        output.set_write_timeout(Some(answer_deadline))?;
        output.set_nodelay(true)?;
        let mut client = NatsClient {
            input: BufReader::with_capacity(256 << 10, output.try_clone()?),
            output,
            next_inbox: 0,
            inbox: format!("_INBOX.test{:016x}", fastrand::u64(..)),
            answer_deadline,
        };
        let line = client.read_line()?;
        if !line.starts_with("INFO ") {
            return Err(broken(format!("expected INFO, got {line}")));
        }
        let mut connect = json!({
            "verbose": false, "pedantic": false, "lang": "rust", "version": "0", "name": "test",
            "protocol": 1, "headers": true, "no_responders": true, "echo": true,
        });
        if let (Some(connect), Some(options)) = (connect.as_object_mut(), options.as_object()) {
            connect.extend(options.clone());
        }
        let inbox = client.inbox.clone();
        client.send(format!("CONNECT {connect}\r\nSUB {inbox}.* 1\r\nPING\r\n").as_bytes())?;
        while client.read_line()? != "PONG" {}
        Ok(client)
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.output.write_all(bytes)
    }

    fn read_line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        if self.input.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        line.truncate(line.trim_end_matches(['\r', '\n']).len());
        if line.starts_with("-ERR") {
            return Err(broken(line));
        }
        Ok(line)
    }

    /// Subscribes under the number `sid` (from 2: 1 is the client's own inbox).
    pub fn try_subscribe(&mut self, subject: &str, sid: u32) -> io::Result<()> {
        self.send(format!("SUB {subject} {sid}\r\nPING\r\n").as_bytes())?;
        while self.read_line()? != "PONG" {}
        Ok(())
    }

    /// The next message of any subscription; answers the server's PINGs meanwhile.
    pub fn try_next(&mut self) -> io::Result<Message> {
        loop {
            let line = self.read_line()?;
            let mut words = line.split(' ');
            let (verb, words) = (words.next().unwrap_or_default(), words.collect::<Vec<_>>());
            match (verb, words.as_slice()) {
                ("PING", _) => self.send(b"PONG\r\n")?,
                ("MSG", [subject, _, reply @ .., size]) => {
                    return self.read_message(subject, reply.first(), "0", size);
                }
                ("HMSG", [subject, _, reply @ .., header_size, size]) => {
                    return self.read_message(subject, reply.first(), header_size, size);
                }
                _ => {}
            }
        }
    }

    fn read_message(
        &mut self,
        subject: &str,
        reply: Option<&&str>,
        header_size: &str,
        size: &str,
    ) -> io::Result<Message> {
        let number = |text: &str| text.parse::<usize>().map_err(io::Error::other);
        let (header_size, size) = (number(header_size)?, number(size)?);
        let mut body = vec![0; size + 2];
        self.input.read_exact(&mut body)?;
        body.truncate(size);
        let header: Vec<u8> = body.drain(..header_size).collect();
        let header = String::from_utf8(header).map_err(io::Error::other)?;
        let mut lines = header.trim_end().split("\r\n");
        let status = lines.next().and_then(|line| line.split(' ').nth(1));
        let pair = |line: &str| {
            let (name, value) = line.split_once(':')?;
            Some((name.to_string(), value.trim().to_string()))
        };
        Ok(Message {
            subject: subject.to_string(),
            reply: reply.map(|reply| reply.to_string()),
            status: status.and_then(|code| code.parse().ok()).unwrap_or(0),
            headers: lines.filter_map(pair).collect(),
            body,
        })
    }

    fn new_inbox(&mut self) -> String {
        self.next_inbox += 1;
        format!("{}.{}", self.inbox, self.next_inbox)
    }

    /// Publishes with headers and a reply subject, and waits for nothing.
    pub fn try_send(
        &mut self,
        subject: &str,
        reply: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> io::Result<()> {
        let mut message = Vec::with_capacity(body.len() + 256);
        if headers.is_empty() {
            write!(message, "PUB {subject} {reply} {}\r\n", body.len())?;
        } else {
            let mut block = String::from("NATS/1.0\r\n");
            for (name, value) in headers {
                block += &format!("{name}: {value}\r\n");
            }
            block += "\r\n";
            let (header_size, size) = (block.len(), block.len() + body.len());
            write!(
                message,
                "HPUB {subject} {reply} {header_size} {size}\r\n{block}"
            )?;
        }
        message.extend_from_slice(body);
        message.extend_from_slice(b"\r\n");
        self.send(&message)
    }

    /// Sends a request and waits for its answer.
    pub fn try_request(
        &mut self,
        subject: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> io::Result<Message> {
        let inbox = self.new_inbox();
        self.try_send(subject, &inbox, headers, body)?;
        let start = Instant::now();
        while start.elapsed() < self.answer_deadline {
            let message = self.try_next()?;
            if message.subject != inbox {
                continue; // late answer to an earlier request
            }
            if message.status == 503 {
                return Err(broken(format!("no responders for {subject}")));
            }
            return Ok(message);
        }
        Err(io::ErrorKind::TimedOut.into())
    }

    /// A call of the JetStream API: `STREAM.INFO.name` and so on.
    pub fn try_api(&mut self, call: &str, body: &Value) -> io::Result<Value> {
        let body = if body.is_null() {
            String::new()
        } else {
            body.to_string()
        };
        let answer = self.try_request(&format!("$JS.API.{call}"), &[], body.as_bytes())?;
        let answer: Value = serde_json::from_slice(&answer.body)?;
        match answer.get("error") {
            Some(error) => Err(broken(format!("{call}: {error}"))),
            None => Ok(answer),
        }
    }

    /// The same, for calls that must succeed.
    #[track_caller]
    pub fn api(&mut self, call: &str, body: &Value) -> Value {
        match self.try_api(call, body) {
            Ok(answer) => answer,
            Err(error) => panic!("JetStream API: {error}"),
        }
    }

    /// Makes a stream on disk that captures `subjects`.
    #[track_caller]
    pub fn add_stream(&mut self, name: &str, subjects: &[&str]) {
        self.add_stream_with(json!({ "name": name, "subjects": subjects }));
    }

    /// Makes a stream from the fields given; what is absent is the server's default.
    #[track_caller]
    pub fn add_stream_with(&mut self, config: Value) {
        let name = config["name"]
            .as_str()
            .expect("a stream has a name")
            .to_string();
        self.api(&format!("STREAM.CREATE.{name}"), &config);
    }

    /// The seed README's `nats stream add jetstream_outbox --subjects=events.>`.
    #[track_caller]
    pub fn add_seed_stream(&mut self) {
        self.add_stream("jetstream_outbox", &["events.>"]);
    }

    /// `config` and `state` of a stream.
    #[track_caller]
    pub fn stream_info(&mut self, stream: &str) -> Value {
        self.api(&format!("STREAM.INFO.{stream}"), &Value::Null)
    }

    /// How many messages the stream holds.
    #[track_caller]
    pub fn message_count(&mut self, stream: &str) -> u64 {
        self.stream_info(stream)["state"]["messages"]
            .as_u64()
            .expect("a count")
    }

    /// The sequence of its last message, 0 before the first.
    #[track_caller]
    pub fn last_seq(&mut self, stream: &str) -> u64 {
        self.stream_info(stream)["state"]["last_seq"]
            .as_u64()
            .expect("a sequence")
    }

    /// The checkpoint of the slot that tests use, once there is one.
    pub fn checkpoint(&mut self) -> Option<Value> {
        self.try_value("jetstream_outbox", ">").ok()
    }

    /// The value of a key that is JSON, the last one written of those that match. A consumer that reads a bucket to its end
    /// can miss a value that is replaced meanwhile.
    pub fn try_value(&mut self, bucket: &str, key: &str) -> io::Result<Value> {
        let last = json!({ "last_by_subj": format!("$KV.{bucket}.{key}") });
        let found = self.try_api(&format!("STREAM.MSG.GET.KV_{bucket}"), &last)?;
        let data = found["message"]["data"].as_str().unwrap_or_default();
        let value = BASE64_STANDARD.decode(data).map_err(io::Error::other)?;
        Ok(serde_json::from_slice(&value)?)
    }

    /// The message at a sequence of a stream, by MSG.GET.
    pub fn try_message(&mut self, stream: &str, seq: u64) -> io::Result<StreamMessage> {
        let found = self.try_api(&format!("STREAM.MSG.GET.{stream}"), &json!({ "seq": seq }))?;
        let found = &found["message"];
        let decode = |field: &str| {
            let text = found[field].as_str().unwrap_or_default();
            BASE64_STANDARD.decode(text).map_err(io::Error::other)
        };
        let headers = String::from_utf8(decode("hdrs")?).map_err(io::Error::other)?;
        let pairs = headers.trim_end().split("\r\n").skip(1);
        let pairs = pairs.filter_map(|line| line.split_once(':'));
        Ok(StreamMessage {
            seq,
            time_ns: 0,
            subject: found["subject"].as_str().unwrap_or_default().to_string(),
            headers: pairs
                .map(|(name, value)| (name.to_string(), value.trim().to_string()))
                .collect(),
            body: decode("data")?,
        })
    }

    /// Publishes into a stream and answers the acknowledgement (`stream`, `seq`, `duplicate`) or its `error`.
    pub fn try_publish(
        &mut self,
        subject: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> io::Result<Value> {
        let answer = self.try_request(subject, headers, body)?;
        Ok(serde_json::from_slice(&answer.body)?)
    }

    /// The same, when somebody must answer.
    #[track_caller]
    pub fn publish(&mut self, subject: &str, headers: &[(&str, &str)], body: &[u8]) -> Value {
        self.try_publish(subject, headers, body)
            .unwrap_or_else(|error| panic!("publish to {subject}: {error}"))
    }

    /// Publishes many messages under one subject, without headers, and sees that each is stored.
    #[track_caller]
    pub fn fill(&mut self, subject: &str, bodies: impl IntoIterator<Item = Vec<u8>>) {
        let inbox = self.new_inbox();
        let mut bodies = bodies.into_iter().peekable();
        while bodies.peek().is_some() {
            let mut sent = 0;
            for body in bodies.by_ref().take(FILL_WINDOW) {
                self.try_send(subject, &inbox, &[], &body).expect("publish");
                sent += 1;
            }
            for _ in 0..sent {
                let ack = self.try_next().expect("an ack");
                let ack: Value = serde_json::from_slice(&ack.body).expect("an ack is JSON");
                assert!(ack["seq"].is_u64(), "publish to {subject}: {ack}");
            }
        }
    }

    /// Every message of the stream, in order.
    #[track_caller]
    pub fn read_all(&mut self, stream: &str) -> Vec<StreamMessage> {
        self.read_from(stream, 1)
    }

    /// Every message of the stream from a sequence on, in order.
    #[track_caller]
    pub fn read_from(&mut self, stream: &str, start_seq: u64) -> Vec<StreamMessage> {
        match self.try_read_from(stream, start_seq) {
            Ok(messages) => messages,
            Err(error) => panic!("read stream {stream}: {error}"),
        }
    }

    /// The same, of a server that may not answer.
    pub fn try_read_from(
        &mut self,
        stream: &str,
        start_seq: u64,
    ) -> io::Result<Vec<StreamMessage>> {
        let mut messages = Vec::new();
        self.try_visit_from(stream, start_seq, |message| messages.push(message))?;
        Ok(messages)
    }

    /// Shows `visit` every message of the stream from a sequence on, in order, and keeps none: for streams that
    /// are larger than the memory of a test. Through an ephemeral consumer that needs no acks, so nothing in the
    /// stream changes. A stream with work-queue retention refuses such a consumer.
    pub fn try_visit_from(
        &mut self,
        stream: &str,
        start_seq: u64,
        mut visit: impl FnMut(StreamMessage),
    ) -> io::Result<()> {
        let consumer = self.try_api(
            &format!("CONSUMER.CREATE.{stream}"),
            &json!({ "stream_name": stream, "config": {
                "deliver_policy": "by_start_sequence", "opt_start_seq": start_seq,
                "ack_policy": "none", "replay_policy": "instant", "num_replicas": 1,
                "mem_storage": true, "inactive_threshold": 60_000_000_000u64,
            }}),
        )?;
        let name = consumer["name"].as_str().unwrap_or_default().to_string();
        let mut pending = consumer["num_pending"].as_u64().unwrap_or(0);
        while pending > 0 {
            let mut delivered = 0;
            let inbox = self.new_inbox();
            let fetch =
                json!({ "batch": FETCH_MESSAGES, "max_bytes": FETCH_BYTES, "no_wait": true });
            let call = format!("$JS.API.CONSUMER.MSG.NEXT.{stream}.{name}");
            self.try_send(&call, &inbox, &[], fetch.to_string().as_bytes())?;
            while pending > 0 {
                // a message comes under its own subject, the status that ends a request under its inbox
                let message = self.try_next()?;
                if message.subject == inbox {
                    break;
                }
                if message.status != 0 {
                    continue; // the end of an earlier request
                }
                let reply = message.reply.unwrap_or_default();
                let (seq, time_ns, left) = consumer_reply(&reply)
                    .ok_or_else(|| broken(format!("not a consumer's reply subject: {reply}")))?;
                pending = left;
                delivered += 1;
                visit(StreamMessage {
                    seq,
                    time_ns,
                    subject: message.subject,
                    headers: message.headers,
                    body: message.body,
                });
            }
            if delivered == 0 {
                return Err(broken(format!(
                    "{pending} messages pending, none delivered"
                )));
            }
        }
        self.try_api(&format!("CONSUMER.DELETE.{stream}.{name}"), &Value::Null)?;
        Ok(())
    }
}

/// A backup of a stream, as `nats stream backup` makes it.
pub struct Snapshot {
    config: Value,
    state: Value,
    chunks: Vec<Vec<u8>>,
}

impl NatsClient {
    /// Takes a backup of a stream (`STREAM.SNAPSHOT`).
    #[track_caller]
    pub fn snapshot(&mut self, stream: &str) -> Snapshot {
        let inbox = self.new_inbox();
        let request = json!({ "deliver_subject": inbox, "no_consumers": true });
        let answer = self.api(&format!("STREAM.SNAPSHOT.{stream}"), &request);
        let mut chunks = Vec::new();
        loop {
            let chunk = self.try_next().expect("a piece of the backup");
            if chunk.subject != inbox {
                continue;
            }
            if let Some(reply) = &chunk.reply {
                self.try_send(reply, "", &[], b"").expect("ask for more");
            }
            match chunk.body.is_empty() {
                true => break,
                false => chunks.push(chunk.body),
            }
        }
        Snapshot {
            config: answer["config"].clone(),
            state: answer["state"].clone(),
            chunks,
        }
    }

    /// Makes a stream of a backup, as `nats stream restore` does; there must be none of its name.
    #[track_caller]
    pub fn restore(&mut self, snapshot: &Snapshot) {
        let name = snapshot.config["name"].as_str().expect("a name");
        let request = json!({ "config": snapshot.config, "state": snapshot.state });
        let answer = self.api(&format!("STREAM.RESTORE.{name}"), &request);
        let to = answer["deliver_subject"]
            .as_str()
            .expect("where to")
            .to_string();
        for chunk in &snapshot.chunks {
            self.try_request(&to, &[], chunk).expect("it takes a piece");
        }
        let end = self.try_request(&to, &[], b"").expect("it takes the end");
        let end: Value = serde_json::from_slice(&end.body).expect("JSON");
        assert!(end["error"].is_null(), "{end}");
    }
}

/// Stream sequence, time and number of messages left, from
/// `$JS.ACK.<stream>.<consumer>.<delivered>.<stream seq>.<consumer seq>.<time>.<pending>`, which may have the
/// domain and the account's hash before the stream.
pub fn consumer_reply(reply: &str) -> Option<(u64, u64, u64)> {
    let mut words = reply.strip_prefix("$JS.ACK.")?.rsplit('.');
    // from the right, the form with a domain has a random token last
    let domain_form = reply.split('.').count() > 9;
    if domain_form {
        words.next();
    }
    let pending = words.next()?.parse().ok()?;
    let time_ns = words.next()?.parse().ok()?;
    let seq = words.nth(1)?.parse().ok()?;
    Some((seq, time_ns, pending))
}
