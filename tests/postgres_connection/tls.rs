//! `sslmode` against certificates that fit and ones that do not, and servers that do not keep to TLS.

use crate::cluster::{connect, primary};
use std::io::{Read, Write};
use std::net::TcpListener;

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
            "verify-full",
            "/nonexistent",
            "read the root certificates /nonexistent",
        ),
    ] {
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
                }
                (Ok(_), expected) => panic!("{text}: expected {expected}"),
            }
        }
    }
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
    for (answer, expected) in [
        (&b"N"[..], "does not offer it, but sslmode requires it"),
        (b"E....", "answered the request for TLS with something else"),
        (b"", "closed the connection"),
        // CVE-2021-23222: AuthenticationOk put behind the answer must not count as the server's word
        (
            b"SR\0\0\0\x08\0\0\0\0Z\0\0\0\x05I",
            "agree on TLS: received corrupt message",
        ),
    ] {
        let port = scripted(answer);
        let text = format!("host=127.0.0.1 port={port} user=u sslmode=require connect_timeout=3");
        let error = connect(&text).unwrap_err().to_string();
        assert!(error.contains(expected), "{answer:?}: {error}");
    }
}
