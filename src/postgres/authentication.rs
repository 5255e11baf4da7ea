//! Which answer the server's request for authentication gets.
//!
//! It decides and computes; `connection` carries the messages.
//! Source: <https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-FLOW-START-UP>.

use super::conninfo::{AuthMethod, ChannelBindingMode};
use super::error::{AuthError, Error};
use super::limits::MAX_SCRAM_ITERATIONS;
use bytes::BytesMut;
use fallible_iterator::FallibleIterator;
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{
    ChannelBinding, SCRAM_SHA_256, SCRAM_SHA_256_PLUS, ScramSha256,
};
use postgres_protocol::message::backend::Message;
use postgres_protocol::message::frontend;

/// One run of authentication, from the startup message to AuthenticationOk.
pub(super) struct Authentication<'a> {
    pub(super) user: &'a str,
    pub(super) password: Option<&'a str>,
    pub(super) mode: ChannelBindingMode,
    pub(super) allowed: Option<&'a [AuthMethod]>,
    /// The session is over TLS.
    pub(super) tls: bool,
    /// `tls-server-end-point` data, if there is any for this session.
    pub(super) end_point: Option<Vec<u8>>,
    pub(super) progress: Progress,
}

/// How far it has come.
pub(super) enum Progress {
    /// Nothing was asked for yet.
    Start,
    /// A password, in clear or hashed, was sent.
    PasswordSent,
    /// SCRAM is under way, with channel binding or without.
    Scram { scram: ScramSha256, bound: bool },
    /// The server has proven that it knows the password.
    ScramProven { bound: bool },
}

impl Authentication<'_> {
    /// Puts the answer to `message`, an authentication request, into `out`. True: the server is content.
    pub(super) fn answer(&mut self, message: &Message, out: &mut BytesMut) -> Result<bool, Error> {
        let encode = |_| {
            Error::Auth(AuthError::Unsupported(
                "a password that contains a zero byte".into(),
            ))
        };
        match message {
            Message::AuthenticationOk => {
                self.check_end()?;
                return Ok(true);
            }
            Message::AuthenticationCleartextPassword => {
                let password = self.plain_method(AuthMethod::Password)?;
                frontend::password_message(password.as_bytes(), out).map_err(encode)?;
                self.progress = Progress::PasswordSent;
            }
            Message::AuthenticationMd5Password(body) => {
                let password = self.plain_method(AuthMethod::Md5)?;
                let hash = md5_hash(self.user.as_bytes(), password.as_bytes(), body.salt());
                frontend::password_message(hash.as_bytes(), out).map_err(encode)?;
                self.progress = Progress::PasswordSent;
            }
            Message::AuthenticationSasl(body) => {
                let offered: Vec<&str> = body
                    .mechanisms()
                    .collect()
                    .map_err(|_| Error::Protocol("malformed list of SASL mechanisms".into()))?;
                self.start_scram(&offered, out)?;
            }
            Message::AuthenticationSaslContinue(body) => {
                let Progress::Scram { scram, .. } = &mut self.progress else {
                    return Err(out_of_turn());
                };
                check_iterations(body.data())?;
                scram.update(body.data()).map_err(scram_failed)?;
                frontend::sasl_response(scram.message(), out).map_err(scram_failed)?;
            }
            Message::AuthenticationSaslFinal(body) => {
                let Progress::Scram { scram, bound } = &mut self.progress else {
                    return Err(out_of_turn());
                };
                scram.finish(body.data()).map_err(scram_failed)?;
                self.progress = Progress::ScramProven { bound: *bound };
            }
            other => {
                return Err(Error::Auth(AuthError::Unsupported(
                    method_name(other).into(),
                )));
            }
        }
        Ok(false)
    }

    fn check_allowed(&self, method: AuthMethod) -> Result<(), Error> {
        match self.allowed {
            Some(allowed) if !allowed.contains(&method) => {
                Err(Error::Auth(AuthError::NotAllowed(method.name())))
            }
            _ => Ok(()),
        }
    }

    fn password(&self) -> Result<&str, Error> {
        self.password.ok_or(Error::Auth(AuthError::NoPassword))
    }

    fn plain_method(&self, method: AuthMethod) -> Result<&str, Error> {
        self.check_allowed(method)?;
        if self.mode == ChannelBindingMode::Require {
            return Err(no_binding("the server asks for a method without it"));
        }
        match self.progress {
            Progress::Start => self.password(),
            // a second request could turn a proven exchange into a leaked password
            _ => Err(out_of_turn()),
        }
    }

    fn start_scram(&mut self, offered: &[&str], out: &mut BytesMut) -> Result<(), Error> {
        if !matches!(self.progress, Progress::Start) {
            return Err(out_of_turn());
        }
        let plus = offered.contains(&SCRAM_SHA_256_PLUS);
        if !plus && !offered.contains(&SCRAM_SHA_256) {
            let offered = offered.join(" or ");
            return Err(Error::Auth(AuthError::Unsupported(format!(
                "SASL {offered}"
            ))));
        }
        self.check_allowed(AuthMethod::Scram)?;
        let wanted = self.mode != ChannelBindingMode::Disable;
        let (mechanism, binding) = match self.end_point.take() {
            Some(data) if wanted && plus => (
                SCRAM_SHA_256_PLUS,
                ChannelBinding::tls_server_end_point(data),
            ),
            _ if self.mode == ChannelBindingMode::Require => {
                return Err(no_binding(match (self.tls, plus) {
                    (false, _) => "the session is not over TLS",
                    (true, false) => "the server does not offer SCRAM-SHA-256-PLUS",
                    (true, true) => "the server's certificate is signed in a way that defines none",
                }));
            }
            // tells the server that we could, so that it notices if its offer was suppressed on the way
            Some(_) if wanted => (SCRAM_SHA_256, ChannelBinding::unrequested()),
            _ => (SCRAM_SHA_256, ChannelBinding::unsupported()),
        };
        let scram = ScramSha256::new(self.password()?.as_bytes(), binding);
        frontend::sasl_initial_response(mechanism, scram.message(), out).map_err(scram_failed)?;
        let bound = mechanism == SCRAM_SHA_256_PLUS;
        self.progress = Progress::Scram { scram, bound };
        Ok(())
    }

    /// The server says that it is content; are we?
    fn check_end(&self) -> Result<(), Error> {
        let bound = match self.progress {
            Progress::Scram { .. } => return Err(Error::Auth(AuthError::ServerNotProven)),
            Progress::ScramProven { bound } => bound,
            Progress::PasswordSent => false,
            Progress::Start => {
                self.check_allowed(AuthMethod::None)?;
                false
            }
        };
        if self.mode == ChannelBindingMode::Require && !bound {
            return Err(no_binding("the server let us in without it"));
        }
        Ok(())
    }
}

/// The server's first message of SCRAM, `r=…,s=…,i=4096`, says how often the password is hashed. (RFC 5802, section 5.1.)
fn check_iterations(message: &[u8]) -> Result<(), Error> {
    let mut attributes = message.split(|byte| *byte == b',');
    let count = attributes.find_map(|attribute| attribute.strip_prefix(b"i="));
    let count = count.and_then(|digits| std::str::from_utf8(digits).ok()?.parse::<u32>().ok());
    match count {
        Some(count) if count > MAX_SCRAM_ITERATIONS => {
            Err(Error::Auth(AuthError::ManyIterations(count)))
        }
        // what is no number the library refuses
        _ => Ok(()),
    }
}

fn no_binding(why: &'static str) -> Error {
    Error::Auth(AuthError::NoChannelBinding(why))
}

fn scram_failed(source: std::io::Error) -> Error {
    Error::Auth(AuthError::Scram(source))
}

fn out_of_turn() -> Error {
    Error::Protocol("an authentication request out of turn".into())
}

fn method_name(message: &Message) -> &'static str {
    match message {
        Message::AuthenticationKerberosV5 => "Kerberos V5",
        Message::AuthenticationGss | Message::AuthenticationGssContinue(_) => "GSSAPI (gss)",
        Message::AuthenticationSspi => "SSPI (sspi)",
        Message::AuthenticationScmCredential => "SCM credentials (scm)",
        _ => "an unknown method",
    }
}
