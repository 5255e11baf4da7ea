//! What a server reports about itself in its INFO, at first and whenever it changes.
//!
//! Follows <https://docs.nats.io/reference/reference-protocols/nats-protocol#info>.

use serde::Deserialize;

/// nats-server refuses a `max_payload` above this (`MAX_PAYLOAD_MAX_SIZE`), so no larger one is believed.
const MAX_PAYLOAD: usize = 64 * 1024 * 1024;

/// The last INFO of a server.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct ServerInfo {
    /// The server's name, or its id if it was given none.
    #[serde(default)]
    pub server_name: String,
    /// For instance `2.12.1`.
    #[serde(default)]
    pub version: String,
    /// The largest message in bytes, headers included. The one after signing in is the account's, if that has its own.
    pub max_payload: usize,
    /// Headers are enabled.
    #[serde(default)]
    pub headers: bool,
    /// JetStream is enabled on the server (an account may still lack it).
    #[serde(default)]
    pub jetstream: bool,
    /// The cluster it is part of.
    #[serde(default)]
    pub cluster: Option<String>,
    /// The JetStream domain, if the server has one.
    #[serde(default)]
    pub domain: Option<String>,
    /// The server insists on TLS.
    #[serde(default)]
    pub tls_required: bool,
    /// The server offers TLS.
    #[serde(default)]
    pub tls_available: bool,
    /// The server wants the client to sign in.
    #[serde(default)]
    pub auth_required: bool,
    /// What an nkey is to sign.
    #[serde(default)]
    pub nonce: Option<String>,
    /// Servers of the cluster that a client may connect to, as `host:port`.
    #[serde(default)]
    pub connect_urls: Vec<String>,
    /// Lame duck mode: the server is about to shut down, and its clients are to go elsewhere.
    #[serde(default)]
    pub ldm: bool,
}

impl ServerInfo {
    /// Reads the JSON of an INFO.
    pub fn parse(json: &[u8]) -> Result<ServerInfo, serde_json::Error> {
        let mut info: ServerInfo = serde_json::from_slice(json)?;
        info.max_payload = info.max_payload.min(MAX_PAYLOAD);
        Ok(info)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_info_is_read() {
        let json = br#"{"server_id":"N","server_name":"hub","version":"2.15.1","proto":1,"host":"127.0.0.1","port":4222,"headers":true,"max_payload":1048576,"jetstream":true,"client_id":5,"domain":"d","xkey":"X","connect_urls":["10.0.0.1:4222"],"ldm":true}"#;
        assert_eq!(
            ServerInfo::parse(json).unwrap(),
            ServerInfo {
                server_name: "hub".into(),
                version: "2.15.1".into(),
                max_payload: 1_048_576,
                headers: true,
                jetstream: true,
                cluster: None,
                domain: Some("d".into()),
                tls_required: false,
                tls_available: false,
                auth_required: false,
                nonce: None,
                connect_urls: vec!["10.0.0.1:4222".into()],
                ldm: true,
            }
        );
        for end in 0..json.len() {
            assert!(ServerInfo::parse(&json[..end]).is_err());
        }
    }

    #[test]
    fn no_payload_is_believed_that_no_server_allows() {
        let info = ServerInfo::parse(br#"{"max_payload":4294967295}"#).unwrap();
        assert_eq!(info.max_payload, MAX_PAYLOAD);
    }
}
