//! A child process that does not outlive its owner.
//!
//! Dropping a [`Process`] kills it, so a test that panics leaves nothing behind. A test program that is
//! itself killed runs no destructors; for that there is the reaper, a shell that holds the reading end of
//! a pipe: when this program ends, however it ends, the pipe closes, and the shell kills what is still
//! registered and removes the temporary folders.

use super::wait::{eventually, poll};
use rustix::process::{Pid, kill_process};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub use rustix::process::Signal;

/// Reads `start <pid>`, `end <pid>`, `folder <path>`, `mount <path>` and `keep <path>` lines until the pipe closes. QUIT
/// first, because a Postgres that is only killed leaves its children to find out for themselves.
const REAPER: &str = r#"
trap '' INT TERM HUP
pids=' ' folders='' mounts=''
while read -r verb what; do
  case $verb in
    start) pids="$pids$what " ;;
    end) case $pids in *" $what "*) pids="${pids%% $what *} ${pids#* $what }" ;; esac ;;
    folder) folders="$folders
$what" ;;
    mount) mounts="$mounts
$what" ;;
    keep) folders=$(printf '%s\n' "$folders" | grep -vxF -e "$what") ;;
  esac
done
for pid in $pids; do kill -CONT "$pid"; kill -QUIT "$pid"; done
for try in 1 2 3 4 5; do
  alive=
  for pid in $pids; do kill -0 "$pid" && alive=1; done
  test -z "$alive" && break
  sleep 1
done
for pid in $pids; do kill -KILL "$pid"; done
printf '%s\n' "$mounts" | while read -r mount; do test -n "$mount" && umount -l "$mount"; done
printf '%s\n' "$folders" | while read -r folder; do test -n "$folder" && rm -rf "$folder"; done
"#;

static SHELL: LazyLock<Mutex<Child>> = LazyLock::new(|| {
    let reaper = Command::new("sh")
        .args(["-c", REAPER])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .expect("start the reaper shell");
    Mutex::new(reaper)
});

fn tell_reaper(line: &str) {
    let mut reaper = lock(&SHELL);
    let input = reaper.stdin.as_mut().expect("stdin was piped");
    writeln!(input, "{line}").expect("the reaper reads until this program ends");
}

/// Has `folder` removed should this program be killed.
pub fn reap_folder(folder: &Path) {
    tell_reaper(&format!("folder {}", folder.display()));
}

/// Has what is mounted there unmounted should this program be killed.
pub fn reap_mount(folder: &Path) {
    tell_reaper(&format!("mount {}", folder.display()));
}

/// Leaves what [`reap_folder`] was told where it is.
pub fn keep_folder(folder: &Path) {
    tell_reaper(&format!("keep {}", folder.display()));
}

/// A running child, killed on drop.
pub struct Process {
    child: Child,
    name: String,
}

impl Process {
    /// Starts `command` with no standard input; the caller decides where its output goes.
    #[track_caller]
    pub fn spawn(name: &str, command: &mut Command) -> Process {
        let child = command
            .stdin(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("start {name} ({command:?}): {error}"));
        tell_reaper(&format!("start {}", child.id()));
        Process {
            child,
            name: name.to_string(),
        }
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The child, for its pipes.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// How it ended, if it did.
    pub fn try_exit(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("wait for our own child")
    }

    /// Sends a signal; a process that has ended already is left alone, its id may be another's.
    pub fn signal(&mut self, signal: Signal) {
        if self.try_exit().is_none() {
            send(self.id(), signal);
        }
    }

    /// Waits until it has ended by itself.
    #[track_caller]
    pub fn wait_exit(&mut self, deadline: Duration) -> ExitStatus {
        let what = format!("{} to end", self.name);
        eventually(&what, deadline, || self.try_exit())
    }

    /// Whether it ends by itself within `deadline`; never panics, for use while unwinding.
    pub fn ends_within(&mut self, deadline: Duration) -> bool {
        poll(deadline, || self.try_exit()).is_ok()
    }

    /// SIGKILL, and waits until it is gone.
    pub fn kill(&mut self) {
        // both fail only when the child has been waited for before: then there is nothing left to do
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        tell_reaper(&format!("end {}", self.id()));
    }
}

/// Sends a signal to a process of which the caller knows that it is ours; one that is gone is no error.
pub fn send(pid: u32, signal: Signal) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let _ = kill_process(pid.expect("a process id is a positive i32"), signal);
}

/// Locks also what a panicking thread held: a fixture must still be able to end its server then, and a
/// second panic while unwinding would abort the test program.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
