//! A private nats-server with JetStream, alone or as a cluster of three.

use super::files::{copy_folder, temp_dir};
use super::natsclient::NatsClient;
use super::ports::{TRIES, free_port};
use super::process::{Process, Signal, lock};
use super::wait::{eventually, poll, secs};
use serde_json::{Value, json};
use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{LazyLock, Mutex};
use std::time::Duration;
use tempfile::TempDir;

/// How long a start, with recovery of its streams, or a stop may take on a busy machine.
const START_DEADLINE: Duration = secs(60);

static SERVER: LazyLock<PathBuf> = LazyLock::new(|| {
    find_server().expect("no nats-server of at least 2.12 found (NATS_SERVER_BIN, target/tools, PATH): run scripts/test, it gets one")
});

fn find_server() -> Option<PathBuf> {
    if let Some(server) = std::env::var_os("NATS_SERVER_BIN") {
        return Some(PathBuf::from(server)).filter(|server| server.exists());
    }
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("target"),
        PathBuf::from,
    );
    let fetched = fs::read_dir(target.join("tools/nats-server"))
        .into_iter()
        .flatten();
    let newest = fetched
        .filter_map(|entry| {
            let folder = entry.ok()?.path();
            let version = version_numbers(folder.file_name()?.to_str()?)?;
            Some((version, folder.join("nats-server"))).filter(|(_, server)| server.exists())
        })
        .max();
    if let Some((_, server)) = newest {
        return Some(server);
    }
    // prints "nats-server: v2.12.8"; on older ones the relay refuses the replicated streams of the tests
    let output = Command::new("nats-server").arg("--version").output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let version = version_numbers(text.trim().rsplit_once('v')?.1)?;
    (version >= vec![2, 12]).then(|| PathBuf::from("nats-server"))
}

fn version_numbers(text: &str) -> Option<Vec<u32>> {
    text.split('.').map(|number| number.parse().ok()).collect()
}

/// What a server is to be; see [`Nats::builder`].
pub struct Builder {
    name: String,
    config: String,
    jetstream: bool,
    cluster: Option<String>,
    files: Vec<(String, Vec<u8>)>,
    client_options: Value,
}

impl Builder {
    /// Lines for the top level of the server's configuration: authorization, accounts, tls, max_payload.
    /// `{dir}` in them stands for the folder that [`Builder::file`] writes to.
    pub fn config(mut self, lines: &str) -> Builder {
        self.config.push_str(lines);
        self.config.push('\n');
        self
    }

    /// A server that only forwards.
    pub fn without_jetstream(mut self) -> Builder {
        self.jetstream = false;
        self
    }

    /// A file in the server's folder: certificates, keys, account tokens.
    pub fn file(mut self, name: &str, content: impl Into<Vec<u8>>) -> Builder {
        self.files.push((name.to_string(), content.into()));
        self
    }

    /// What the fixture's own client puts into CONNECT, when the configuration asks for it: a user and
    /// password, say.
    pub fn client_options(mut self, options: Value) -> Builder {
        self.client_options = options;
        self
    }

    /// Makes and starts it, and waits until it serves.
    pub fn build(self) -> Nats {
        let dir = temp_dir("nats-");
        for (name, content) in &self.files {
            fs::write(dir.path().join(name), content).expect("write a file of the server");
        }
        let server = Nats {
            port: Mutex::new(free_port()),
            dir,
            builder: self,
            server: Mutex::new(None),
        };
        for _ in 0..TRIES {
            let Err(Exited { log }) = server.try_start() else {
                return server;
            };
            // another program took the port between our look and the server's
            assert!(
                log.contains("address already in use"),
                "start nats-server:\n{log}"
            );
            *lock(&server.port) = free_port();
        }
        panic!(
            "start nats-server: {TRIES} times a port of its own, or that of its routes, was taken"
        );
    }
}

/// The server ended instead of serving, or did not serve in time.
struct Exited {
    log: String,
}

/// A server of our own. All methods take `&self`: a test may poll from one thread and break from another.
pub struct Nats {
    dir: TempDir,
    port: Mutex<u16>,
    builder: Builder,
    server: Mutex<Option<Process>>,
}

impl Nats {
    /// A running server with JetStream and no authentication.
    pub fn start() -> Nats {
        Nats::builder().build()
    }

    /// A server with a configuration of the test's own.
    pub fn builder() -> Builder {
        Builder {
            name: "test".to_string(),
            config: String::new(),
            jetstream: true,
            cluster: None,
            files: Vec::new(),
            client_options: json!({}),
        }
    }

    /// A hub and a leaf node of it, each with a JetStream domain of its own, `hub` and `leaf`; with these lines in the leaf
    /// node's configuration.
    pub fn hub_and_leaf(of_leaf: &str, client_options: &Value) -> (Nats, Nats) {
        Nats::hub_and_leaf_by(|port| port, of_leaf, client_options)
    }

    /// The same, where the leaf node reaches the hub by the port that `way` makes of the hub's.
    pub fn hub_and_leaf_by(
        way: impl FnOnce(u16) -> u16,
        of_leaf: &str,
        client_options: &Value,
    ) -> (Nats, Nats) {
        let port = free_port();
        let server = |domain: &str, leafnodes: &str, config: &str, options: &Value| {
            let jetstream =
                format!("jetstream {{ store_dir: \"{{dir}}/store\", domain: {domain} }}");
            let config = format!("{jetstream}\nleafnodes {{ {leafnodes} }}\n{config}");
            let builder = Nats::builder().without_jetstream().config(&config);
            builder.client_options(options.clone()).build()
        };
        let listen = format!("listen: \"127.0.0.1:{port}\"");
        let hub = server("hub", &listen, "", &json!({}));
        let way = way(port);
        let remote = format!("remotes: [{{ url: \"nats-leaf://127.0.0.1:{way}\" }}]");
        let remote = format!("reconnect: \"1s\", {remote}");
        let leaf = server("leaf", &remote, of_leaf, client_options);
        let mut client = leaf.client();
        eventually(
            "the hub to be reached from the leaf",
            START_DEADLINE,
            || client.try_request("$JS.hub.API.INFO", &[], b"").map(drop),
        );
        (hub, leaf)
    }

    /// The port on 127.0.0.1; it stays the same over restarts.
    pub fn port(&self) -> u16 {
        *lock(&self.port)
    }

    /// Where clients connect.
    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port())
    }

    /// The folder that [`Builder::file`] wrote to.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A connection for looking at streams.
    #[track_caller]
    pub fn client(&self) -> NatsClient {
        self.try_client()
            .unwrap_or_else(|error| panic!("connect to nats-server: {error}"))
    }

    /// The same, for a server that may be down.
    pub fn try_client(&self) -> std::io::Result<NatsClient> {
        NatsClient::try_connect(self.port(), &self.builder.client_options)
    }

    /// For asking a server that may have no leader yet: it answers nothing then.
    fn impatient_client(&self) -> std::io::Result<NatsClient> {
        NatsClient::try_connect_within(self.port(), &self.builder.client_options, secs(1))
    }

    /// What the server has logged, all starts together.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir().join("log")).unwrap_or_default()
    }

    /// Stop and start.
    pub fn restart(&self) {
        self.stop();
        self.start_again();
    }

    /// An orderly end; streams are written out.
    pub fn stop(&self) {
        self.end(Signal::TERM);
    }

    /// Has it read its configuration again, and the files that this includes.
    pub fn reload(&self) {
        let said = || self.log().matches("Reloaded server configuration").count();
        let before = said();
        self.signal(Signal::HUP);
        eventually(
            "nats-server to read its configuration",
            START_DEADLINE,
            || said() > before,
        );
    }

    /// Lame duck mode, to its end: JetStream is shut down and the clients are told to go; after the grace period
    /// (`lame_duck_grace_period`, 10 s) those that stay are cut off one by one.
    pub fn lame_duck(&self) {
        self.end(Signal::USR2);
    }

    fn end(&self, signal: Signal) {
        if let Some(mut process) = lock(&self.server).take() {
            process.signal(signal);
            process.wait_exit(START_DEADLINE);
        }
    }

    /// SIGKILL. What the operating system has is kept.
    pub fn kill(&self) {
        *lock(&self.server) = None;
    }

    /// SIGSTOP: the connections stay open and nothing moves.
    pub fn freeze(&self) {
        self.signal(Signal::STOP);
    }

    /// SIGCONT.
    pub fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    /// From now on it writes no file beyond this size, as if the disk were full; `None`: it may again.
    pub fn limit_files(&self, bytes: Option<u64>) {
        let server = lock(&self.server);
        let id = server.as_ref().expect("the server is running").id();
        let soft = bytes.map_or("unlimited".into(), |bytes| bytes.to_string());
        let mut command = Command::new("prlimit");
        command.args([&format!("--pid={id}"), &format!("--fsize={soft}:unlimited")]);
        let status = command.status().expect("run prlimit, of util-linux");
        assert!(status.success(), "prlimit: {status}");
    }

    fn signal(&self, signal: Signal) {
        let mut server = lock(&self.server);
        let process = server.as_mut().expect("the server is running");
        process.signal(signal);
    }

    /// Starts it where it was stopped or killed, on the same port.
    #[track_caller]
    pub fn start_again(&self) {
        eventually(
            "nats-server to start again",
            START_DEADLINE,
            || match self.try_start() {
                Ok(()) => true,
                Err(Exited { log }) if log.contains("address already in use") => false,
                Err(Exited { log }) => panic!("start nats-server again:\n{log}"),
            },
        );
    }

    /// Copies the store of a stopped server: a backup, for [`Nats::restore_store`].
    pub fn snapshot_store(&self) -> TempDir {
        self.assert_stopped();
        self.copy_store()
    }

    /// Copies the store of a running server, which is frozen meanwhile: what a power loss would leave of it.
    pub fn snapshot_store_frozen(&self) -> TempDir {
        self.freeze();
        let snapshot = self.copy_store();
        self.thaw();
        snapshot
    }

    fn copy_store(&self) -> TempDir {
        let snapshot = temp_dir("nats-backup-");
        copy_folder(&self.store_dir(), &snapshot.path().join("store"));
        snapshot
    }

    /// Puts an earlier store in place of the present one, while the server is stopped.
    pub fn restore_store(&self, snapshot: &TempDir) {
        self.assert_stopped();
        copy_folder(&snapshot.path().join("store"), &self.store_dir());
    }

    /// Tears the second half off the file that a stream's last messages are in, while the server is stopped; its index
    /// stays as it is. This is what a power loss does that comes between the one being synced and the other.
    pub fn tear_stream(&self, stream: &str) {
        self.assert_stopped();
        let folder = self.store_dir().join("jetstream/$G/streams");
        let folder = folder.join(stream).join("msgs");
        let number = |path: &PathBuf| {
            let name = path.file_name()?.to_str()?.strip_suffix(".blk")?;
            name.parse::<u64>().ok()
        };
        let files = fs::read_dir(&folder).expect("read the folder of a stream");
        let files = files.map(|file| file.expect("read the folder of a stream").path());
        let last = files
            .max_by_key(number)
            .filter(|path| number(path).is_some());
        let last = last.expect("a stream that holds something has a file");
        let file = fs::OpenOptions::new().write(true).open(last);
        let file = file.expect("open the file of a stream");
        let size = file.metadata().expect("look at the file of a stream").len();
        file.set_len(size / 2)
            .expect("truncate the file of a stream");
    }

    fn assert_stopped(&self) {
        assert!(lock(&self.server).is_none(), "stop the server first");
    }

    fn store_dir(&self) -> PathBuf {
        self.dir().join("store")
    }

    fn write_config(&self) -> PathBuf {
        let mut config = format!(
            "server_name: {}\nlisten: 127.0.0.1:{}\n{}",
            self.builder.name,
            self.port(),
            self.builder.config
        );
        if self.builder.jetstream {
            let store = self.store_dir();
            config += &format!(
                "jetstream {{\nstore_dir: \"{}\"\nmax_memory_store: 1GB\nmax_file_store: 8GB\n}}\n",
                store.display()
            );
        }
        if let Some(block) = &self.builder.cluster {
            config += block;
        }
        let config = config.replace("{dir}", &self.dir().display().to_string());
        let path = self.dir().join("config");
        fs::write(&path, config).expect("write the server's configuration");
        path
    }

    /// The same for one whose files are damaged: whether it serves by then. It is killed if not.
    pub fn starts_again_within(&self, deadline: Duration) -> bool {
        self.try_start_within(deadline).is_ok()
    }

    fn try_start(&self) -> Result<(), Exited> {
        self.try_start_within(START_DEADLINE)
    }

    fn try_start_within(&self, deadline: Duration) -> Result<(), Exited> {
        let mut server = lock(&self.server);
        assert!(server.is_none(), "nats-server is running already");
        let config = self.write_config();
        let log_before = self.log().len();
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.dir().join("log"))
            .expect("open the server's log");
        let mut process = Process::spawn(
            "nats-server",
            Command::new(&*SERVER)
                .arg("-c")
                .arg(config)
                .current_dir(self.dir())
                .stdout(log.try_clone().expect("duplicate a file handle"))
                .stderr(log),
        );
        // a node says that it is ready before it has the port of its routes, and may yet end for the lack of it
        let last_step = match self.builder.cluster {
            Some(_) => "Listening for route connections",
            None => "Server is ready",
        };
        let ready = poll(deadline, || {
            if process.try_exit().is_some() {
                return Some(false);
            }
            let new = self.log().split_off(log_before);
            new.contains(last_step).then_some(true)
        });
        if ready != Ok(true) {
            let log = self.log().split_off(log_before);
            return Err(Exited { log });
        }
        *server = Some(process);
        Ok(())
    }
}

impl Drop for Nats {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("---- log of nats-server ----\n{}", self.log());
        }
        self.kill();
    }
}

/// Three servers, over which a stream can be replicated.
pub struct NatsCluster {
    /// The servers; each can be stopped, killed and frozen by itself.
    pub nodes: [Nats; 3],
}

impl NatsCluster {
    /// Starts three servers and waits until a stream with three replicas can be made.
    pub fn start() -> NatsCluster {
        NatsCluster::start_with(|_, node| node)
    }

    /// The same with servers of the caller's own, by their index.
    pub fn start_with(configure: impl Fn(usize, Builder) -> Builder) -> NatsCluster {
        let routes = [free_port(), free_port(), free_port()];
        let list = routes
            .map(|port| format!("nats-route://127.0.0.1:{port}"))
            .join(", ");
        let mut number = 0;
        let nodes = routes.map(|port| {
            number += 1;
            let mut node = Nats::builder();
            node = configure(number - 1, node);
            node.name = format!("node{number}");
            node.cluster = Some(format!(
                "cluster {{\nname: test\nlisten: 127.0.0.1:{port}\nroutes: [{list}]\n}}\n"
            ));
            node.build()
        });
        let cluster = NatsCluster { nodes };
        cluster.wait_ready();
        cluster
    }

    /// Waits until a stream with three replicas can be made: the metadata has a leader that knows all.
    pub fn wait_ready(&self) {
        eventually(
            "the cluster to place three replicas",
            START_DEADLINE,
            || {
                let mut client = self.nodes[0].try_client()?;
                client.try_api(
                    "STREAM.CREATE.probe",
                    &json!({ "name": "probe", "subjects": ["test.probe"], "num_replicas": 3 }),
                )?;
                client.try_api("STREAM.DELETE.probe", &Value::Null)
            },
        );
    }

    /// Makes a stream with three replicas and waits until it has a leader that every node reaches: until then
    /// a publish is answered "no responders".
    #[track_caller]
    pub fn add_stream(&self, name: &str, subjects: &[&str]) {
        let config = json!({ "name": name, "subjects": subjects, "num_replicas": 3 });
        self.nodes[0].client().add_stream_with(config);
        let probe = subjects[0].replace(['>', '*'], "probe");
        for node in &self.nodes {
            // an expectation that no stream meets: answered with an error, and never stored
            let refused = [("Nats-Expected-Stream", "none")];
            eventually("the stream to answer", START_DEADLINE, || {
                node.impatient_client()?.try_publish(&probe, &refused, b"")
            });
        }
    }

    /// The node that leads a stream, by its index; `None` while there is none.
    pub fn leader(&self, stream: &str) -> Option<usize> {
        let info = self.nodes.iter().find_map(|node| {
            let mut client = node.impatient_client().ok()?;
            let info = client.try_api(&format!("STREAM.INFO.{stream}"), &Value::Null);
            info.ok()
        })?;
        let name = info["cluster"]["leader"].as_str()?;
        self.nodes.iter().position(|node| node.builder.name == name)
    }
}
