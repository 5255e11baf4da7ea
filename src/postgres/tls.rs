//! TLS to the server: libpq's `sslmode` in terms of rustls, and the data that binds SCRAM to the session.
//!
//! Differences from libpq: nothing older than TLS 1.2; a name is checked against subjectAltName only, never
//! the common name; a named `sslrootcert` must exist in every mode.
//! Sources: <https://www.postgresql.org/docs/current/libpq-ssl.html>, RFC 5929 section 4.1.

use super::conninfo::{ConnInfo, OptionalFile, Roots, SslMode, TlsInfo, TlsVersion};
use super::error::{Cause, Error};
use super::limits::MAX_FILE_BYTES;
use super::stream::Deadlined;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms};
use rustls::server::ParsedCertificate;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{
    CertificateError, ClientConfig, ClientConnection, DigitallySignedStruct, RootCertStore,
    SignatureScheme,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use socket2::Socket;
use std::io::Read;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;
use x509_cert::Certificate;
use x509_cert::der::Decode;

/// Reads the certificates that `info` names. To be called for every attempt, so that renewed files count.
pub(super) fn client_config(info: &TlsInfo) -> Result<Arc<ClientConfig>, Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let versions: &[_] = match (info.min_version, info.max_version) {
        (TlsVersion::Tls13, _) => &[&rustls::version::TLS13],
        (_, TlsVersion::Tls12) => &[&rustls::version::TLS12],
        _ => &[&rustls::version::TLS13, &rustls::version::TLS12],
    };
    let verifier = Verifier {
        trust: trust(info)?,
        check_name: info.mode == SslMode::VerifyFull,
        algorithms: provider.signature_verification_algorithms,
    };
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(versions)
        .map_err(|e| failed("set up TLS", e))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match client_certificate(info, &provider)? {
        Some(certified) => {
            builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(certified)))
        }
        None => builder.with_no_client_auth(),
    };
    config.enable_sni = info.sni;
    Ok(Arc::new(config))
}

/// Shakes hands over a socket whose server has agreed to. `peer` stands in for a `host` that is no legal
/// DNS name, which matters only where names are not checked.
pub(super) fn handshake(
    socket: &Socket,
    config: Arc<ClientConfig>,
    info: &ConnInfo,
    host: &str,
    peer: IpAddr,
    deadline: Instant,
) -> Result<ClientConnection, std::io::Error> {
    let name = match ServerName::try_from(host.to_string()) {
        Ok(name) => name,
        Err(_) if info.tls.mode != SslMode::VerifyFull => ServerName::IpAddress(peer.into()),
        Err(error) => return Err(std::io::Error::other(error)),
    };
    let mut session = ClientConnection::new(config, name).map_err(std::io::Error::other)?;
    session.complete_io(&mut Deadlined { socket, deadline })?;
    Ok(session)
}

/// Adds what to do, where the library's words do not say it.
pub(super) fn explain(error: Cause) -> Cause {
    let hint = match error.downcast_ref() {
        Some(rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer)) => {
            "no certificate in sslrootcert has signed the server's"
        }
        Some(rustls::Error::InvalidCertificate(CertificateError::Other(other)))
            if other.to_string() == "UnsupportedCertVersion" =>
        {
            "the server's certificate is of version 1; issue it anew with a subjectAltName"
        }
        _ => return error,
    };
    format!("{error}: {hint}").into()
}

/// The hash of the server's certificate that `tls-server-end-point` asks for; `None` if its signature
/// algorithm names no hash that we know.
pub(super) fn server_end_point(session: &ClientConnection) -> Option<Vec<u8>> {
    end_point(session.peer_certificates()?.first()?)
}

fn end_point(certificate: &CertificateDer<'_>) -> Option<Vec<u8>> {
    let algorithm = Certificate::from_der(certificate).ok()?.signature_algorithm;
    let digest = match algorithm.oid.to_string().as_str() {
        // RFC 5929 raises MD5 and SHA-1 to SHA-256. RSA with md5, sha1, sha256; ECDSA with sha1, sha256
        "1.2.840.113549.1.1.4"
        | "1.2.840.113549.1.1.5"
        | "1.2.840.113549.1.1.11"
        | "1.2.840.10045.4.1"
        | "1.2.840.10045.4.3.2" => &ring::digest::SHA256,
        // RSA and ECDSA with sha384
        "1.2.840.113549.1.1.12" | "1.2.840.10045.4.3.3" => &ring::digest::SHA384,
        // RSA and ECDSA with sha512
        "1.2.840.113549.1.1.13" | "1.2.840.10045.4.3.4" => &ring::digest::SHA512,
        _ => return None,
    };
    Some(ring::digest::digest(digest, certificate).as_ref().to_vec())
}

fn failed(
    doing: impl Into<String>,
    source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> Error {
    Error::Tls {
        doing: doing.into(),
        source: source.into(),
        lasting: true,
    }
}

fn read_file(what: &str, path: &Path) -> Result<Vec<u8>, Error> {
    let doing = || format!("read the {what} {}", path.display());
    let mut bytes = Vec::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(MAX_FILE_BYTES).read_to_end(&mut bytes))
        .map_err(|e| failed(doing(), e))?;
    Ok(bytes)
}

fn read_certificates(what: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let doing = || format!("read the {what} {}", path.display());
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(&read_file(what, path)?)
        .collect::<Result<_, _>>()
        .map_err(|e| failed(doing(), e))?;
    match certificates.is_empty() {
        true => Err(failed(doing(), "no PEM certificate in it")),
        false => Ok(certificates),
    }
}

/// The file to use: a named one in any case, the default one if it is there.
fn existing(file: &OptionalFile) -> Option<PathBuf> {
    match file {
        OptionalFile::Named(path) => Some(path.clone()),
        OptionalFile::Default(path) => path.clone().filter(|path| path.exists()),
    }
}

/// Whom to believe.
#[derive(Debug)]
struct Trust {
    authorities: RootCertStore,
    /// The same certificates as they are. A server may show one of them as its own: a self-signed one that
    /// was copied to the clients.
    certificates: Vec<CertificateDer<'static>>,
}

/// `None`: nothing is to be verified.
fn trust(info: &TlsInfo) -> Result<Option<Trust>, Error> {
    let mut authorities = RootCertStore::empty();
    let mut certificates = Vec::new();
    match &info.roots {
        Roots::System => {
            let loaded = rustls_native_certs::load_native_certs();
            authorities.add_parsable_certificates(loaded.certs);
            if authorities.is_empty() {
                let cause = loaded.errors.first().map(|error| error.to_string());
                return Err(failed(
                    "load the system's root certificates",
                    cause.unwrap_or_else(|| "there are none; install ca-certificates".into()),
                ));
            }
        }
        Roots::File(file) => {
            let must_verify = info.mode >= SslMode::VerifyCa;
            let Some(path) = existing(file) else {
                return match must_verify {
                    true => Err(failed(
                        "find the root certificates",
                        "no sslrootcert given and no ~/.postgresql/root.crt; name the file, use \
                         sslrootcert=system, or change sslmode",
                    )),
                    false => Ok(None),
                };
            };
            certificates = read_certificates("root certificates", &path)?;
            for certificate in &certificates {
                authorities.add(certificate.clone()).map_err(|e| {
                    failed(format!("read the root certificates {}", path.display()), e)
                })?;
            }
        }
    }
    Ok(Some(Trust {
        authorities,
        certificates,
    }))
}

fn client_certificate(
    info: &TlsInfo,
    provider: &CryptoProvider,
) -> Result<Option<CertifiedKey>, Error> {
    let Some(path) = existing(&info.certificate) else {
        return Ok(None);
    };
    let chain = read_certificates("client certificate", &path)?;
    let path = match &info.key {
        OptionalFile::Named(path) | OptionalFile::Default(Some(path)) => path,
        OptionalFile::Default(None) => {
            return Err(failed(
                "find the client key",
                "no sslkey given for the sslcert, and no home directory to look in",
            ));
        }
    };
    let doing = || format!("read the client key {}", path.display());
    check_key_permissions(path).map_err(|e| failed(doing(), e))?;
    let key = PrivateKeyDer::from_pem_slice(&read_file("client key", path)?)
        .map_err(|e| failed(doing(), format!("{e} (an encrypted key is not supported)")))?;
    let key = provider
        .key_provider
        .load_private_key(key)
        .map_err(|e| failed(doing(), e))?;
    Ok(Some(CertifiedKey::new(chain, key)))
}

/// libpq's rule: nobody but the owner, or root and a group of readers.
fn check_key_permissions(path: &Path) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let metadata = path.metadata()?;
    let forbidden = if metadata.uid() == 0 { 0o037 } else { 0o077 };
    if !metadata.is_file() {
        return Err("not a regular file".into());
    }
    if metadata.mode() & forbidden != 0 {
        return Err("group or world can access it; make it 0600, or 0640 if root owns it".into());
    }
    Ok(())
}

/// Checks what `sslmode` asks for: always that the server holds its certificate's key, which channel
/// binding rests on; with roots the chain; with `check_name` the name.
#[derive(Debug)]
struct Verifier {
    trust: Option<Trust>,
    check_name: bool,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if let Some(trust) = &self.trust {
            match trust.certificates.contains(certificate) {
                true => check_dates(certificate, now)?,
                false => verify_server_cert_signed_by_trust_anchor(
                    &ParsedCertificate::try_from(certificate)?,
                    &trust.authorities,
                    intermediates,
                    now,
                    self.algorithms.all,
                )?,
            }
            if self.check_name {
                verify_server_name(&ParsedCertificate::try_from(certificate)?, name)?;
            }
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_signature(&self.algorithms, message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_signature(&self.algorithms, message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

fn check_dates(certificate: &CertificateDer<'_>, now: UnixTime) -> Result<(), CertificateError> {
    let parsed = Certificate::from_der(certificate).map_err(|_| CertificateError::BadEncoding)?;
    let validity = parsed.tbs_certificate.validity;
    let now = now.as_secs();
    if now < validity.not_before.to_unix_duration().as_secs() {
        return Err(CertificateError::NotValidYet);
    }
    if now > validity.not_after.to_unix_duration().as_secs() {
        return Err(CertificateError::Expired);
    }
    Ok(())
}

/// Like rustls' own, but for certificates of version 1 too, which the manual's recipe makes.
fn verify_signature(
    algorithms: &WebPkiSupportedAlgorithms,
    message: &[u8],
    certificate: &CertificateDer<'_>,
    signature: &DigitallySignedStruct,
) -> Result<HandshakeSignatureValid, rustls::Error> {
    let parsed = Certificate::from_der(certificate).map_err(|_| CertificateError::BadEncoding)?;
    let key = parsed
        .tbs_certificate
        .subject_public_key_info
        .subject_public_key
        .raw_bytes();
    let scheme = |(scheme, _): &&(SignatureScheme, _)| *scheme == signature.scheme;
    let candidates = algorithms.mapping.iter().find(scheme);
    let valid = candidates.is_some_and(|(_, candidates)| {
        candidates.iter().any(|algorithm| {
            algorithm
                .verify_signature(key, message, signature.signature())
                .is_ok()
        })
    });
    match valid {
        true => Ok(HandshakeSignatureValid::assertion()),
        false => Err(CertificateError::BadSignature.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, KeyPair};

    #[test]
    fn the_hash_that_binds_the_channel_is_the_one_of_the_signature() {
        for (algorithm, digest) in [
            (&rcgen::PKCS_ECDSA_P256_SHA256, Some(&ring::digest::SHA256)),
            (&rcgen::PKCS_ECDSA_P384_SHA384, Some(&ring::digest::SHA384)),
            (&rcgen::PKCS_ED25519, None),
        ] {
            let key = KeyPair::generate_for(algorithm).unwrap();
            let certificate = CertificateParams::default().self_signed(&key).unwrap();
            let expected = digest.map(|digest| {
                ring::digest::digest(digest, certificate.der())
                    .as_ref()
                    .to_vec()
            });
            assert_eq!(end_point(certificate.der()), expected, "{algorithm:?}");
        }
        assert_eq!(end_point(&CertificateDer::from(&b"\x30\x03abc"[..])), None);
    }

    #[test]
    fn a_key_that_others_can_read_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let file = tempfile::NamedTempFile::new().unwrap();
        let by_root = file.path().metadata().unwrap().uid() == 0;
        for (mode, legal) in [
            (0o600, true),
            (0o400, true),
            (0o640, by_root),
            (0o644, false),
            (0o660, false),
            (0o601, false),
        ] {
            let permissions = std::fs::Permissions::from_mode(mode);
            std::fs::set_permissions(file.path(), permissions).unwrap();
            assert_eq!(
                check_key_permissions(file.path()).is_ok(),
                legal,
                "{mode:o}"
            );
        }
        assert!(check_key_permissions(Path::new("/")).is_err());
    }
}
