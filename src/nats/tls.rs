//! TLS to a NATS server: what is trusted, the handshake, and taking records apart.

use super::error::Error;
use super::handshake::Timed;
use super::info::ServerInfo;
use super::options::{Options, ServerUrl};
use rustls::client::ClientConnection;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::{self, PemObject};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use std::io::{self, Read};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

/// Whether either side asks for it: whoever names an authority or a certificate wants nothing said in clear. An error if the
/// server has none to offer.
pub fn is_wanted(options: &Options, server: &ServerUrl, info: &ServerInfo) -> Result<bool, Error> {
    let is_wanted = server.tls
        || options.tls_ca.is_some()
        || options.tls_cert.is_some()
        || options.tls_first
        || info.tls_required;
    if is_wanted && !info.tls_required && !info.tls_available {
        return Err(Error::Tls {
            server: server.to_string(),
            reason: "the server does not offer TLS, which tls://, -nats-tls-ca and -nats-tls-cert ask for".into(),
        });
    }
    Ok(is_wanted)
}

/// How to make TLS connections to this server: files are read, and a second handshake is shorter.
pub fn config(options: &Options, server: &ServerUrl) -> Result<Arc<ClientConfig>, Error> {
    let failed = |reason: String| Error::Tls {
        server: server.to_string(),
        reason,
    };
    let config = load(options).map_err(|error| error.unwrap_or_else(failed))?;
    Ok(Arc::new(config))
}

/// Makes the handshake on what is connected.
pub fn open(
    config: &Arc<ClientConfig>,
    server: &ServerUrl,
    stream: &TcpStream,
    deadline: Instant,
) -> Result<ClientConnection, Error> {
    let failed = |reason: String| Error::Tls {
        server: server.to_string(),
        reason,
    };
    let name = ServerName::try_from(server.tls_name().to_string())
        .map_err(|_| failed("the host name cannot be one of a certificate".into()))?;
    let mut session =
        ClientConnection::new(config.clone(), name).map_err(|error| failed(error.to_string()))?;
    session.set_buffer_limit(None);
    // each read and write ends at the deadline, and so does a peer's drip of single bytes
    let mut stream = Timed { stream, deadline };
    while session.is_handshaking() {
        if let Err(error) = session.complete_io(&mut stream) {
            return Err(match error.kind() {
                io::ErrorKind::TimedOut => failed("the TLS handshake took too long".into()),
                _ => failed(error.to_string()),
            });
        }
    }
    Ok(session)
}

/// `Err(Ok(_))` is an error of a file, `Err(Err(_))` one of TLS.
fn load(options: &Options) -> Result<ClientConfig, Result<Error, String>> {
    let mut roots = RootCertStore::empty();
    match &options.tls_ca {
        Some(path) => {
            for cert in certificates("certificate authority file", path).map_err(Ok)? {
                roots.add(cert).map_err(|error| Err(error.to_string()))?;
            }
        }
        None => {
            let found = rustls_native_certs::load_native_certs();
            roots.add_parsable_certificates(found.certs);
            if roots.is_empty() {
                return Err(Err(
                    "this system has no certificate authorities; name a file of them".into(),
                ));
            }
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| Err(error.to_string()))?
        .with_root_certificates(roots);
    match (&options.tls_cert, &options.tls_key) {
        (Some(cert), Some(key)) => {
            let chain = certificates("client certificate file", cert).map_err(Ok)?;
            let key = PrivateKeyDer::from_pem_file(key)
                .map_err(|error| Ok(file_error("client key file", key, error)))?;
            builder
                .with_client_auth_cert(chain, key)
                .map_err(|error| Err(format!("use the client certificate: {error}")))
        }
        _ => Ok(builder.with_no_client_auth()),
    }
}

fn certificates(what: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let certs: Vec<_> = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|error| file_error(what, path, error))?;
    if certs.is_empty() {
        return Err(file_error(what, path, pem::Error::NoItemsFound));
    }
    Ok(certs)
}

fn file_error(what: &'static str, path: &Path, error: pem::Error) -> Error {
    let source = match error {
        pem::Error::Io(error) => error,
        // the others may hold what the file holds
        pem::Error::NoItemsFound => io::Error::other("it holds no such PEM section"),
        _ => io::Error::other("it is not PEM"),
    };
    Error::File {
        what,
        path: path.into(),
        source,
    }
}

/// Appends to `open` what the records in `sealed` hold; false: the server has said that nothing follows.
pub fn unseal(
    session: &mut ClientConnection,
    mut sealed: &[u8],
    open: &mut Vec<u8>,
) -> io::Result<bool> {
    while !sealed.is_empty() {
        if session.read_tls(&mut sealed)? == 0 {
            return Ok(false);
        }
        session.process_new_packets().map_err(io::Error::other)?;
        take_plaintext(session, open)?;
    }
    Ok(true)
}

/// Appends to `open` what was taken apart before: the handshake may have brought something along.
pub fn take_plaintext(session: &mut ClientConnection, open: &mut Vec<u8>) -> io::Result<()> {
    match session.reader().read_to_end(open) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
        Err(error) => Err(error),
    }
}
