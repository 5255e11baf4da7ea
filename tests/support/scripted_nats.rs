//! A NATS server that does what no real one can be made to do. It listens until the test's process ends.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;

/// With every field that a client may insist on.
pub const INFO: &str = r#"INFO {"server_id":"N","version":"2.15.1","proto":1,"go":"go1","host":"h","port":1,"headers":true,"max_payload":1048576,"client_id":5}"#;

/// Does this with each client; where it is: `host:port`.
pub fn serve(serve: impl Fn(TcpStream) + Clone + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("its address").to_string();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (stream, serve) = (stream.expect("a client"), serve.clone());
            thread::spawn(move || serve(stream));
        }
    });
    address
}

/// Greets each client, and gives each line that it says, and the connection, to a clone of `hear`.
pub fn serve_lines(hear: impl FnMut(&str, &mut TcpStream) + Clone + Send + 'static) -> String {
    serve(move |mut stream| {
        say(&mut stream, &format!("{INFO}\r\n"));
        let mut hear = hear.clone();
        let reader = BufReader::new(stream.try_clone().expect("the connection"));
        let lines = reader.lines().map_while(Result::ok);
        lines.for_each(|line| hear(&line, &mut stream));
    })
}

/// Whoever listens may be gone.
pub fn say(stream: &mut TcpStream, text: &str) {
    let _ = stream.write_all(text.as_bytes());
}
