//! `sslmode` against certificates that fit and ones that do not, and servers that do not keep to TLS.

use crate::cluster::{Cluster, connect, primary, reachable};
use crate::support::files::temp_dir;
use jetstream_outbox::postgres::Error;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::Command;

#[test]
fn sslmode_decides_what_of_the_certificate_counts() {
    let server = primary();
    let port = server.port;
    let (ca, other) = (server.file("ca.crt"), server.file("other_ca.crt"));
    // the certificate is for 127.0.0.1 and localhost, not for ::1
    for (host, sslmode, roots, expected) in [
        ("127.0.0.1", "require", "", "ok"),
        ("127.0.0.1", "verify-ca", "", "no sslrootcert given"),
        ("127.0.0.1", "verify-full", "", "no sslrootcert given"),
        ("127.0.0.1", "verify-ca", &ca, "ok"),
        ("127.0.0.1", "verify-full", &ca, "ok"),
        ("localhost", "verify-full", &ca, "ok"),
        ("::1", "verify-ca", &ca, "ok"),
        (
            "::1",
            "verify-full",
            &ca,
            "invalid peer certificate: certificate not valid for name",
        ),
        ("::1", "require", &ca, "ok"),
        (
            "127.0.0.1",
            "require",
            &other,
            "invalid peer certificate: UnknownIssuer",
        ),
        (
            "127.0.0.1",
            "verify-ca",
            &other,
            "invalid peer certificate: UnknownIssuer",
        ),
        (
            "127.0.0.1",
            "verify-full",
            &other,
            "invalid peer certificate: UnknownIssuer",
        ),
        (
            "127.0.0.1",
            "verify-full",
            "system",
            "invalid peer certificate: UnknownIssuer",
        ),
        (
            "127.0.0.1",
            "prefer",
            "/nonexistent",
            "read the root certificates /nonexistent",
        ),
        (
            "127.0.0.1",
            "verify-full",
            "/nonexistent",
            "read the root certificates /nonexistent",
        ),
    ] {
        if !reachable(host) {
            continue;
        }
        for version in ["TLSv1.2", "TLSv1.3"] {
            let mut text = format!(
                "host={host} port={port} user=postgres sslmode={sslmode} \
                 ssl_min_protocol_version={version} ssl_max_protocol_version={version}"
            );
            if !roots.is_empty() {
                text += &format!(" sslrootcert={roots}");
            }
            match (connect(&text), expected) {
                (Ok(connection), "ok") => {
                    let description = connection.tls_description().unwrap();
                    let version = version.replace('.', "_");
                    assert!(description.starts_with(&version), "{description}");
                }
                (Err(error), expected) => {
                    assert!(error.to_string().contains(expected), "{text}\n{error}");
                    assert!(is_lasting(&error), "{text}\n{error}");
                }
                (Ok(_), expected) => panic!("{text}: expected {expected}"),
            }
        }
    }
}

/// Whether the only host failed in a way that no second try mends.
fn is_lasting(error: &Error) -> bool {
    let Error::Connect(attempts) = error else {
        panic!("{error}")
    };
    matches!(&attempts[..], [(_, Error::Tls { lasting: true, .. })])
}

/// A server that answers the request for TLS with `answer` and then waits for the client to say more; with
/// an empty answer it hangs up.
fn scripted(answer: &'static [u8]) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let mut client = client.unwrap();
            let mut request = [0; 8];
            if client.read_exact(&mut request).is_ok() {
                client.write_all(answer).unwrap();
                if !answer.is_empty() {
                    let _ = client.read(&mut [0; 1000]);
                }
            }
        }
    });
    port
}

#[test]
fn a_server_without_tls_is_told_apart() {
    for (answer, lasting, expected) in [
        (
            &b"N"[..],
            true,
            "does not offer it, but sslmode requires it",
        ),
        (
            b"E....",
            false,
            "answered the request for TLS with something else",
        ),
        (b"", false, "closed the connection"),
        // CVE-2021-23222: AuthenticationOk put behind the answer must not count as the server's word
        (
            b"SR\0\0\0\x08\0\0\0\0Z\0\0\0\x05I",
            false,
            "agree on TLS: received corrupt message",
        ),
    ] {
        let port = scripted(answer);
        let text = format!("host=127.0.0.1 port={port} user=u sslmode=require connect_timeout=3");
        let error = connect(&text).unwrap_err();
        assert!(error.to_string().contains(expected), "{answer:?}: {error}");
        assert_eq!(is_lasting(&error), lasting, "{answer:?}: {error}");
    }
}

/// Makes a server certificate with openssl's `arguments`.
fn openssl(folder: &std::path::Path, arguments: &str) {
    let output = Command::new("openssl")
        .args(arguments.split(' '))
        .current_dir(folder)
        .output()
        .expect("openssl, which Debian's PostgreSQL depends on");
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments}: {message}");
}

#[test]
fn certificates_as_people_make_them_by_the_manual() {
    let folder = temp_dir("openssl-");
    let folder = folder.path();
    let request = "req -new -newkey rsa:2048 -nodes -subj /CN=localhost -keyout";
    openssl(
        folder,
        &format!(
            "{request} self.key -x509 -days 2 -out self.crt -addext subjectAltName=DNS:localhost"
        ),
    );
    openssl(folder, &format!("{request} old.key -out old.csr"));
    openssl(
        folder,
        "x509 -req -in old.csr -days 2 -CA self.crt -CAkey self.key -CAcreateserial -out old.crt",
    );

    // each with the modes that it must serve, and what the others say
    for (certificate, roots, outcomes) in [
        (
            "self",
            "self",
            [
                ("require", "ok"),
                ("verify-ca", "ok"),
                ("verify-full", "ok"),
            ],
        ),
        (
            "old",
            "old",
            [
                ("require", "ok"),
                ("verify-ca", "ok"),
                ("verify-full", "version 1"),
            ],
        ),
        (
            "old",
            "self",
            [
                ("require", "version 1"),
                ("verify-ca", "version 1"),
                ("verify-full", "version 1"),
            ],
        ),
    ] {
        let file = |name: &str, suffix: &str| {
            let path = folder.join(format!("{certificate}.{suffix}"));
            (name.to_string(), std::fs::read_to_string(path).unwrap())
        };
        let (shown, key) = (file("server.crt", "crt"), file("server.key", "key"));
        let server = Cluster::start(vec![shown, key, file("ca.crt", "crt")]);
        let roots = folder.join(format!("{roots}.crt"));
        for (sslmode, expected) in outcomes {
            let text = format!(
                "host=localhost port={} user=by_scram password='pass word' dbname=postgres \
                 channel_binding=require sslmode={sslmode} sslrootcert={}",
                server.port,
                roots.display()
            );
            let found = connect(&text).map_or_else(|error| error.to_string(), |_| "ok".into());
            assert!(found.contains(expected), "{certificate} {sslmode}: {found}");
        }
        // without roots nothing is verified, but the channel is bound
        let text = server.tcp(
            "by_scram",
            "password='pass word' sslmode=require channel_binding=require",
        );
        connect(&text).unwrap();
    }
}
