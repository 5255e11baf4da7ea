//! Who nats-server's operator mode lets in: an operator, an account and its users, as JSON Web Tokens that say so (ADR-14).

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use nkeys::KeyPair;

/// An operator with one account, beside the system's own that JetStream asks for.
pub struct Operator {
    operator: KeyPair,
    system: KeyPair,
    account: KeyPair,
    limits: String,
    revoked_before: Option<u64>,
}

impl Operator {
    /// The account may do everything but what `limits` says: further members of the claim of that name, each with a comma
    /// before it.
    pub fn new(limits: &str) -> Operator {
        Operator {
            operator: KeyPair::new_operator(),
            system: KeyPair::new_account(),
            account: KeyPair::new_account(),
            limits: limits.to_string(),
            revoked_before: None,
        }
    }

    /// From now on [`config`](Self::config) revokes every user whose token is from that second of the epoch or before; those
    /// made here say 1600000000 unless their claims have an `iat` of their own.
    pub fn revoke_before(&mut self, second: u64) {
        self.revoked_before = Some(second);
    }

    /// Lines for the server's configuration.
    pub fn config(&self) -> String {
        let operator = self.operator.public_key();
        let (system, account) = (self.system.public_key(), self.account.public_key());
        let tokens = [(&system, ""), (&account, self.limits.as_str())].map(|(key, more)| {
            let limits = format!(
                r#""limits":{{"subs":-1,"data":-1,"payload":-1,"imports":-1,"exports":-1,"wildcards":true,"conn":-1,"leaf":-1{more}}}"#
            );
            let revoked = self.revoked_before.map_or(String::new(), |second| {
                format!(r#","revocations":{{"*":{second}}}"#)
            });
            let of_account = format!("{limits}{revoked}");
            token(&self.operator, key, "account", "", &of_account)
        });
        format!(
            "operator: {}\nsystem_account: {system}\nresolver: MEMORY\nresolver_preload: {{\n{system}: {}\n{account}: {}\n}}",
            token(&self.operator, &operator, "operator", "", ""),
            tokens[0],
            tokens[1]
        )
    }

    /// The credentials file of a new user; `claims` are further members of its token, each with a comma behind it.
    pub fn credentials(&self, claims: &str) -> String {
        let user = KeyPair::new_user();
        format!(
            "-----BEGIN NATS USER JWT-----\n{}\n------END NATS USER JWT------\n\n-----BEGIN USER NKEY SEED-----\n{}\n------END USER NKEY SEED------\n",
            self.user(&user, claims, ""),
            user.seed().expect("a pair that was made has its seed")
        )
    }

    /// The token of a user who need not prove that it is theirs.
    pub fn bearer(&self) -> String {
        self.user(&KeyPair::new_user(), "", r#","bearer_token":true"#)
    }

    fn user(&self, user: &KeyPair, claims: &str, more: &str) -> String {
        let limits = format!(r#""subs":-1,"data":-1,"payload":-1{more}"#);
        token(&self.account, &user.public_key(), "user", claims, &limits)
    }
}

/// `claims` stand beside those of NATS, `of_nats` among them.
pub fn token(issuer: &KeyPair, subject: &str, kind: &str, claims: &str, of_nats: &str) -> String {
    let encode = |text: &str| URL_SAFE_NO_PAD.encode(text);
    let comma = if of_nats.is_empty() { "" } else { "," };
    let head = encode(r#"{"typ":"JWT","alg":"ed25519-nkey"}"#);
    let body = encode(&format!(
        r#"{{"jti":"x","iat":1600000000,"iss":"{}","name":"n","sub":"{subject}",{claims}"nats":{{{of_nats}{comma}"type":"{kind}","version":2}}}}"#,
        issuer.public_key()
    ));
    let signed = format!("{head}.{body}");
    let signature = issuer
        .sign(signed.as_bytes())
        .expect("an issuer has its seed");
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
}

/// What a token claims; who has signed it is not looked at.
pub fn claims(token: &str) -> serde_json::Value {
    let body = token.split('.').nth(1).expect("a token has three parts");
    let body = URL_SAFE_NO_PAD.decode(body).expect("its parts are base64");
    serde_json::from_slice(&body).expect("its claims are JSON")
}
