//! The session that the `postgres` crate is given.

use crate::rig::DEADLINE;
use crate::support::postgres::Postgres;
use crate::support::proxy::{Mode, Proxy};
use crate::support::wait::throughout;
use jetstream_outbox::postgres::handover::{Handover, hand_over};
use jetstream_outbox::postgres::{ConnInfo, Connection};
use postgres::config::SslMode;
use postgres::{Client, Config, Error, NoTls};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

fn offer(port: u16, limit: Duration) -> Handover {
    let text = format!("host=127.0.0.1 port={port} user=postgres dbname=postgres sslmode=disable");
    let info = ConnInfo::parse(&text, &|_| None).expect("a connection string");
    let connection = Connection::connect(&info.without_replication()).expect("a session");
    hand_over(connection, limit).expect("a socket")
}

fn take(offer: &Handover, user: &str) -> Result<Client, Error> {
    Config::new()
        .hostaddr(offer.address.ip())
        .port(offer.address.port())
        .user(user)
        .ssl_mode(SslMode::Disable)
        .connect(NoTls)
}

#[test]
fn only_who_knows_the_token_gets_the_session_and_only_one() {
    let pg = Postgres::start();
    let offer = offer(pg.port(), DEADLINE);
    assert!(take(&offer, "postgres").is_err(), "a stranger");
    for garbage in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[0, 0, 0, 3],
        &[0xff; 8],
        &[],
    ] {
        let mut stranger = TcpStream::connect(offer.address).expect("connect");
        // it may have been closed already
        let _ = stranger.write_all(garbage);
        stranger.shutdown(std::net::Shutdown::Write).ok();
        let mut said = Vec::new();
        let _ = stranger.read_to_end(&mut said);
        assert_eq!(said, b"", "{garbage:?}");
    }
    let mut client = take(&offer, &offer.token).expect("the rightful one");
    let rows = client
        .query("SELECT repeat('x', $1), current_user::text", &[&200_000])
        .expect("an answer");
    assert_eq!(rows[0].get::<_, String>(0).len(), 200_000);
    assert_eq!(rows[0].get::<_, String>(1), "postgres");
    let error = client.batch_execute("SELECT none").expect_err("no column");
    assert_eq!(error.code().map(|code| code.code()), Some("42703"));
    assert!(take(&offer, &offer.token).is_err(), "the second");
    client.simple_query("SELECT 1").expect("the first goes on");
}

#[test]
fn a_server_that_has_vanished_is_not_waited_for() {
    let pg = Postgres::start();
    let proxy = Proxy::start(pg.port());
    let offer = offer(proxy.port(), Duration::from_secs(1));
    let mut client = take(&offer, &offer.token).expect("a session");
    // longer than the limit, but no answer is due
    client.batch_execute("SELECT 1").expect("an answer");
    throughout("the idle session", Duration::from_millis(2500), || {
        !client.is_closed()
    });
    client.batch_execute("SELECT 1").expect("it is still there");
    proxy.set(Mode::Freeze);
    let start = Instant::now();
    let error = client.batch_execute("SELECT 1").expect_err("no answer");
    assert!(error.is_closed() || error.code().is_none(), "{error:?}");
    assert!(start.elapsed() < DEADLINE / 2, "{:?}", start.elapsed());
}
