use super::*;
use socket2::SockRef;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::sync::Weak;

const LONG: Duration = Duration::from_secs(30);

/// Messages by number, each with a body.
struct Messages(VecDeque<(u64, Vec<u8>)>);

impl Burst for Messages {
    fn encode_next(&mut self, inbox: &str, out: &mut Vec<u8>) -> bool {
        let Some((number, body)) = self.0.pop_front() else {
            return false;
        };
        write!(out, "PUB events.a {inbox}{number} {}\r\n", body.len()).unwrap();
        out.extend_from_slice(&body);
        out.extend_from_slice(b"\r\n");
        true
    }
}

type Test = Connection<(u64, String)>;

/// Message `number`, with a body of that many of its last digit.
fn publish(connection: &Test, messages: &[(u64, usize)]) {
    let made = messages.iter().map(|&(number, len)| {
        let digit = b'0' + (number % 10) as u8;
        (number, vec![digit; len])
    });
    connection.publish(Box::new(Messages(made.collect())));
}

/// A server, which has a small receive buffer, too.
fn listen<T: Send + 'static>(
    serve: impl FnOnce(&TcpListener) -> T + Send + 'static,
) -> (TcpListener, thread::JoinHandle<T>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    SockRef::from(&listener).set_recv_buffer_size(4096).unwrap();
    let accepting = listener.try_clone().unwrap();
    (listener, thread::spawn(move || serve(&accepting)))
}

/// Greets a client with INFO and `after`, and reads up to its PING.
fn greet(listener: &TcpListener, after: &[u8]) -> BufReader<TcpStream> {
    let (mut stream, _) = listener.accept().unwrap();
    let info = b"INFO {\"headers\":true,\"max_payload\":1048576}\r\n";
    stream.write_all(&[info, after].concat()).unwrap();
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    while line != "PING\r\n" {
        line.clear();
        // it may go away before
        if reader.read_line(&mut line).unwrap_or_default() == 0 {
            break;
        }
    }
    reader
}

/// Opens a connection to whom `listener` is.
fn open(listener: &TcpListener, options: &Options, send_buffer: usize) -> Result<Test, Error> {
    let server = ServerUrl::parse(&listener.local_addr().unwrap().to_string()).unwrap();
    let inbox = "_INBOX.me.".to_string();
    let session = handshake::sign_in(options, &server, "SUB _INBOX.me.* 1\r\n")?;
    SockRef::from(&session.stream)
        .set_send_buffer_size(send_buffer)
        .unwrap();
    Connection::open(options, server, session, inbox, |number, _, body| {
        (number, String::from_utf8_lossy(body).into_owned())
    })
}

fn within(connect_timeout: Duration) -> Options {
    Options {
        connect_timeout,
        ..Options::default()
    }
}

/// A connection, whose send buffer is small, to a server that answers the first PING, and goes on as `serve`, which
/// is given what comes after that.
fn connect<T: Send + 'static>(
    options: &Options,
    serve: impl FnOnce(BufReader<TcpStream>) -> T + Send + 'static,
) -> (Test, thread::JoinHandle<T>) {
    let (listener, thread) = listen(|accepting| {
        let mut reader = greet(accepting, b"");
        reader.get_mut().write_all(b"PONG\r\n").unwrap();
        serve(reader)
    });
    (open(&listener, options, 4096).unwrap(), thread)
}

/// One message: its number and its body.
fn read_message(reader: &mut BufReader<TcpStream>) -> Option<(u64, Vec<u8>)> {
    let mut line = String::new();
    while !line.starts_with("PUB ") {
        line.clear();
        // a connection that is dropped may be reset
        if reader.read_line(&mut line).unwrap_or_default() == 0 {
            return None;
        }
        assert!(line.starts_with("PUB ") || line == "PONG\r\n", "{line}");
    }
    let words: Vec<&str> = line.split_ascii_whitespace().collect();
    let [_, "events.a", reply, all] = words[..] else {
        panic!("{line}");
    };
    let mut message = vec![0; all.parse::<usize>().unwrap() + 2];
    reader.read_exact(&mut message).unwrap();
    assert!(message.ends_with(b"\r\n"));
    message.truncate(message.len() - 2);
    let number = reply.rsplit('.').next().unwrap().parse().unwrap();
    Some((number, message))
}

/// What has come by the time that `is_enough` is content.
fn collect(
    connection: &Test,
    is_enough: impl Fn(&[Answer<(u64, String)>]) -> bool,
) -> Vec<Answer<(u64, String)>> {
    let mut all = Vec::new();
    while !is_enough(&all) {
        all.extend(connection.answers().recv_timeout(LONG).unwrap());
    }
    all
}

/// Now the publisher writes, now the writing thread, and PINGs are answered in between; no byte goes astray.
#[test]
fn everything_is_sent_once_and_in_order_whoever_sends_it() {
    const COUNT: u64 = 3000;
    let (connection, server) = connect(&Options::default(), |mut reader| {
        for number in 0..COUNT {
            if number % 7 == 0 {
                reader.get_mut().write_all(b"PING\r\n").unwrap();
            }
            let (found, body) = read_message(&mut reader).unwrap();
            assert_eq!(found, number);
            let digit = b'0' + (number % 10) as u8;
            assert!(body.iter().all(|&byte| byte == digit));
            if number == COUNT / 2 {
                // the other side gets far ahead
                thread::sleep(Duration::from_millis(200));
            }
        }
        reader
    });
    let mut random = fastrand::Rng::with_seed(7);
    let mut number = 0;
    while number < COUNT {
        let end = (number + random.u64(1..20)).min(COUNT);
        let mut burst = Vec::new();
        for number in number..end {
            let len = [10, 300, 5000, 90_000][random.usize(..4)];
            burst.push((number, random.usize(..len)));
        }
        number = end;
        publish(&connection, &burst);
        if random.u8(..4) == 0 {
            thread::yield_now();
        }
    }
    let _open = server.join().unwrap();
    assert!(connection.lost().is_empty());
}

#[test]
fn a_publish_never_waits_and_a_drop_ends_the_threads() {
    let (connection, server) = connect(&Options::default(), |reader| {
        // reads nothing more
        reader.into_inner()
    });
    let _frozen = server.join().unwrap();
    let started = Instant::now();
    for number in 0..30 {
        publish(&connection, &[(number, 900_000)]);
    }
    assert!(started.elapsed() < Duration::from_secs(2));
    let lost = connection.lost().clone();
    assert!(lost.is_empty());
    let shared = Arc::downgrade(&connection.shared);
    drop(connection);
    let error = lost.recv_timeout(LONG).unwrap();
    assert!(matches!(error, Error::Lost { .. }), "{error}");
    are_gone(&shared);
}

/// The threads, and so the socket.
fn are_gone(shared: &Weak<Shared>) {
    let deadline = Instant::now() + LONG;
    while shared.strong_count() > 0 {
        assert!(Instant::now() < deadline, "a thread is left");
        thread::yield_now();
    }
}

/// Also when it is found out by writing; and what was answered before is handed on.
#[test]
fn the_end_is_reported_in_the_servers_words_before_the_answers_end() {
    let (connection, server) = connect(&Options::default(), |mut reader| {
        read_message(&mut reader).unwrap();
        let said = "MSG _INBOX.me.1 1 2\r\nhi\r\n-ERR 'Stale Connection'\r\n";
        reader.get_mut().write_all(said.as_bytes()).unwrap();
    });
    publish(&connection, &[(1, 10), (2, 10)]);
    let answers = connection.answers().recv_timeout(LONG).unwrap();
    let [Answer::Ack((1, body))] = &answers[..] else {
        panic!("{answers:?}")
    };
    assert_eq!(body, "hi");
    server.join().unwrap();
    // until the socket knows that nobody is there
    for number in 3..50 {
        publish(&connection, &[(number, 100_000)]);
    }
    assert!(connection.answers().recv_timeout(LONG).is_err());
    let error = connection.lost().try_recv().expect("reported before");
    assert!(error.to_string().contains("Stale Connection"), "{error}");
}

#[test]
fn a_drop_ends_a_reading_thread_whose_answers_nobody_takes() {
    let (connection, server) = connect(&Options::default(), |mut reader| {
        let ack = "MSG _INBOX.me.1 1 2\r\nhi\r\n";
        // until the other side takes no more, and is gone
        while reader.get_mut().write_all(ack.as_bytes()).is_ok() {}
    });
    let deadline = Instant::now() + LONG;
    while connection.answers().len() < READS_AHEAD {
        assert!(Instant::now() < deadline, "{}", connection.answers().len());
        thread::yield_now();
    }
    let shared = Arc::downgrade(&connection.shared);
    let lost = connection.lost().clone();
    drop(connection);
    lost.recv_timeout(LONG).unwrap();
    are_gone(&shared);
    server.join().unwrap();
}

#[test]
fn a_request_is_answered_once_by_the_server_or_by_its_deadline() {
    let (connection, server) = connect(&Options::default(), |mut reader| {
        let mut line = String::new();
        while !line.starts_with("PUB last ") {
            line.clear();
            reader.read_line(&mut line).unwrap();
        }
        let said = "MSG _INBOX.me.r7 1 2\r\nhi\r\nMSG _INBOX.me.r7 1 5\r\nagain\r\nMSG _INBOX.me.r99 1 1\r\nx\r\n\
            HMSG _INBOX.me.r8 1 16 16\r\nNATS/1.0 503\r\n\r\n\r\n";
        reader.get_mut().write_all(said.as_bytes()).unwrap();
        reader
    });
    let ask = |token, subject, timeout| {
        connection.request(&Request {
            token,
            subject,
            header: Some(("A", "b")).filter(|_| token == 7),
            body: b"{}",
            deadline: Instant::now() + timeout,
        });
    };
    ask(7, "a", LONG);
    ask(8, "a", LONG);
    ask(9, "a", Duration::from_millis(10));
    ask(10, "a", LONG);
    ask(11, "last", LONG);
    let _open = server.join().unwrap();
    let mut replies = Vec::new();
    for answer in collect(&connection, |answers| answers.len() == 3) {
        match answer {
            Answer::Reply(Reply { token, result }) => replies.push((token, result)),
            other => panic!("{other:?}"),
        }
    }
    replies.sort_by_key(|(token, _)| *token);
    assert_eq!(
        replies,
        [
            (7, Ok(b"hi".to_vec())),
            (8, Err(NoReply::NoResponders)),
            (9, Err(NoReply::Timeout)),
        ]
    );
    assert!(connection.forget(10) && !connection.forget(7));
}

/// One that is frozen, or behind a network that has vanished.
#[test]
fn a_server_without_a_sign_of_life_is_given_up() {
    let options = Options {
        request_timeout: Duration::from_millis(500),
        ..Options::default()
    };
    let (connection, server) = connect(&options, |mut reader| {
        let mut line = String::new();
        for _ in 0..3 {
            line.clear();
            reader.read_line(&mut line).unwrap();
            assert_eq!(line, "PING\r\n");
            reader.get_mut().write_all(b"PONG\r\n").unwrap();
        }
        reader
    });
    let _silent = server.join().unwrap();
    let lived = Instant::now();
    let error = connection.lost().recv_timeout(LONG).unwrap();
    assert!(
        error.to_string().contains("has not answered a PING"),
        "{error}"
    );
    assert!(
        lived.elapsed() > Duration::from_millis(500),
        "{:?}",
        lived.elapsed()
    );
}

#[test]
fn a_later_info_is_taken_over() {
    let (connection, server) = connect(&Options::default(), |mut reader| {
        let said = "INFO {\"max_payload\":5,\"ldm\":true,\"connect_urls\":[\"10.0.0.1:4222\"]}\r\nINFO {\"x\":1}\r\n";
        reader.get_mut().write_all(said.as_bytes()).unwrap();
        reader
    });
    collect(&connection, |answers| matches!(answers, [Answer::Info]));
    let info = connection.info();
    assert_eq!((info.max_payload, info.ldm), (5, true));
    drop(server.join().unwrap());
}

#[test]
fn nobody_is_believed_a_length_that_was_not_asked_for() {
    for line in [
        "MSG _INBOX.me.1 1 4294967295\r\n",
        "MSG _INBOX.me.r1 1 65537\r\n",
        "MSG x 1 4294967295\r\n",
        "HMSG _INBOX.me.1 1 65537 65537\r\n",
    ] {
        let (connection, server) = connect(&Options::default(), move |mut reader| {
            reader.get_mut().write_all(line.as_bytes()).unwrap();
            reader
        });
        let error = connection.lost().recv_timeout(LONG).unwrap();
        assert!(
            error.to_string().contains("a larger message than"),
            "{error}"
        );
        drop(server.join().unwrap());
    }
}

#[test]
fn what_follows_the_greeting_is_why_nobody_is_let_in() {
    let (listener, server) = listen(|accepting| {
        greet(accepting, b"-ERR 'maximum connections exceeded'\r\n");
    });
    let refused = open(&listener, &Options::default(), 4096);
    let error = refused.err().unwrap();
    assert!(
        error.to_string().contains("maximum connections exceeded"),
        "{error}"
    );
    server.join().unwrap();
}

/// A long JWT, for instance.
#[test]
fn more_than_the_socket_takes_can_be_said_to_sign_in() {
    let (listener, server) = listen(|accepting| {
        let mut reader = greet(accepting, b"");
        reader.get_mut().write_all(b"PONG\r\n").unwrap();
        reader
    });
    let options = Options {
        name: "x".repeat(1_000_000),
        ..Options::default()
    };
    open(&listener, &options, 4096).unwrap();
    server.join().unwrap();
}

#[test]
fn a_server_that_says_everything_but_pong_is_given_up_in_time() {
    let (listener, server) = listen(|accepting| {
        let mut reader = greet(accepting, b"");
        while reader.get_mut().write_all(b"PING\r\n+OK\r\n").is_ok() {}
    });
    let refused = open(&listener, &within(Duration::from_millis(200)), 4096);
    let error = refused.err().unwrap();
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
    server.join().unwrap();
}
