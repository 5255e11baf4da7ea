//! Shows a [`Disk`] to the kernel by FUSE, and takes its power away.
//!
//! A cut comes when the servers on the disk are dead: the file system goes, with all that the kernel has cached of it, and comes
//! back with what the disk has kept.

use crate::disk::{Content, Disk, Inode, Lost, ROOT, Refusal, Rules};
use crate::support::process::{lock, reap_mount};
use crate::support::wait::{eventually, secs};
use fastrand::Rng;
use fuser::{
    BackgroundSession, BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem,
    FopenFlags, Generation, INodeNo, LockOwner, MountOption, OpenFlags, RenameFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs,
    ReplyWrite, Request, SessionACL, TimeOrNow, WriteFlags,
};
use rustix::fs::OFlags;
use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

/// Nobody changes anything behind the kernel's back.
const TTL: Duration = secs(86_400);

const BLOCK: u64 = 4096;

/// So large does a disk without a limit seem.
const SEEMING_SIZE: u64 = 64 << 30;

/// A mounted disk; dropped, it is gone with all that is on it.
pub struct Drive {
    disk: Arc<Mutex<Disk>>,
    folder: PathBuf,
    session: Mutex<Option<BackgroundSession>>,
}

impl Drive {
    /// Mounts an empty one under `folder`, which is created.
    pub fn mount(folder: &Path, rules: Rules) -> io::Result<Drive> {
        std::fs::create_dir_all(folder)?;
        let drive = Drive {
            disk: Arc::new(Mutex::new(Disk::new(rules))),
            folder: folder.to_owned(),
            session: Mutex::new(None),
        };
        reap_mount(folder);
        drive.attach()?;
        Ok(drive)
    }

    fn attach(&self) -> io::Result<()> {
        let mut config = Config::default();
        config.mount_options = vec![
            MountOption::FSName("power".into()),
            MountOption::DefaultPermissions,
            MountOption::NoAtime,
        ];
        config.acl = SessionACL::All;
        let shown = Shown {
            disk: Arc::clone(&self.disk),
            folders: Mutex::default(),
            next: AtomicU64::new(1),
        };
        let session = fuser::spawn_mount(shown, &self.folder, &config)?;
        *lock(&self.session) = Some(session);
        Ok(())
    }

    fn detach(&self) {
        let Some(session) = lock(&self.session).take() else {
            return;
        };
        // not by the session's own way, which tries once
        eventually("the disk to be unmounted", secs(30), || {
            let output = Command::new("umount").arg(&self.folder).output();
            let output = output.expect("run umount");
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            let done = output.status.success() || said.contains("not mounted");
            if done { Ok(()) } else { Err(said) }
        });
        session.join().expect("a disk works until it is unmounted");
    }

    pub fn path(&self) -> &Path {
        &self.folder
    }

    /// What is on it is durable.
    pub fn sync(&self) {
        lock(&self.disk).sync();
    }

    /// The power is gone for a moment; nobody uses it.
    pub fn cut(&self, random: &mut Rng) -> Lost {
        self.detach();
        let lost = lock(&self.disk).cut(random);
        self.attach().expect("mount the disk again");
        lost
    }

    /// It has room for so many bytes more; `None`: for all.
    pub fn leave_room(&self, bytes: Option<u64>) {
        let mut disk = lock(&self.disk);
        let limit = bytes.map_or(u64::MAX, |bytes| disk.used() + bytes);
        disk.set_limit(limit);
    }

    /// How often it had no room.
    pub fn refused(&self) -> u64 {
        lock(&self.disk).refused
    }
}

impl Drop for Drive {
    fn drop(&mut self) {
        let umount = Command::new("umount").arg("-l").arg(&self.folder).output();
        // an error leaves it to the reaper
        let _ = umount;
        drop(lock(&self.session).take());
    }
}

/// Inode, kind and name.
type Entry = (u64, FileType, OsString);

/// What the kernel talks to.
struct Shown {
    disk: Arc<Mutex<Disk>>,
    /// What a folder had when it was opened.
    folders: Mutex<HashMap<u64, Vec<Entry>>>,
    next: AtomicU64,
}

impl From<Refusal> for Errno {
    fn from(refusal: Refusal) -> Errno {
        match refusal {
            Refusal::NotFound => Errno::ENOENT,
            Refusal::Exists => Errno::EEXIST,
            Refusal::NotFolder => Errno::ENOTDIR,
            Refusal::IsFolder => Errno::EISDIR,
            Refusal::NotEmpty => Errno::ENOTEMPTY,
            Refusal::Full => Errno::ENOSPC,
        }
    }
}

fn kind(inode: &Inode) -> FileType {
    match inode.content {
        Content::File(_) => FileType::RegularFile,
        Content::Folder(_) => FileType::Directory,
    }
}

fn attributes(number: u64, inode: &Inode) -> FileAttr {
    let size = match &inode.content {
        Content::File(file) => file.live.len() as u64,
        Content::Folder(_) => 0,
    };
    FileAttr {
        ino: INodeNo(number),
        size,
        blocks: size.div_ceil(512),
        atime: inode.modified,
        mtime: inode.modified,
        ctime: inode.modified,
        crtime: inode.modified,
        kind: kind(inode),
        perm: inode.mode,
        nlink: inode.links(),
        uid: inode.uid,
        gid: inode.gid,
        rdev: 0,
        blksize: BLOCK as u32,
        flags: 0,
    }
}

/// Each write is synced before it is answered.
fn is_synchronous(flags: i32) -> bool {
    let dsync = OFlags::DSYNC.bits() as i32;
    flags & dsync == dsync
}

impl Shown {
    /// A new file or folder of the one who asks.
    fn make(
        &self,
        request: &Request,
        folder: INodeNo,
        name: &OsStr,
        is_folder: bool,
        mode: u32,
    ) -> Result<u64, Refusal> {
        let mode = mode as u16 & 0o7777;
        let owner = (request.uid(), request.gid());
        lock(&self.disk).create(folder.0, name, is_folder, mode, owner)
    }

    fn entry(&self, found: Result<u64, Refusal>, reply: ReplyEntry) {
        let disk = lock(&self.disk);
        match found.and_then(|number| Ok((number, disk.inode(number)?))) {
            Ok((number, inode)) => reply.entry(&TTL, &attributes(number, inode), Generation(0)),
            Err(refusal) => reply.error(refusal.into()),
        }
    }
}

fn answer(done: Result<(), Refusal>, reply: ReplyEmpty) {
    match done {
        Ok(()) => reply.ok(),
        Err(refusal) => reply.error(refusal.into()),
    }
}

impl Filesystem for Shown {
    fn lookup(&self, _: &Request, folder: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = lock(&self.disk).lookup(folder.0, name);
        self.entry(found, reply);
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match lock(&self.disk).inode(inode.0) {
            Ok(found) => reply.attr(&TTL, &attributes(inode.0, found)),
            Err(refusal) => reply.error(refusal.into()),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        inode: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        modified: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let mut disk = lock(&self.disk);
        let resized = size.map_or(Ok(()), |size| disk.resize(inode.0, size as usize));
        match resized.and_then(|()| disk.inode_mut(inode.0)) {
            Ok(found) => {
                found.mode = mode.map_or(found.mode, |mode| mode as u16 & 0o7777);
                found.uid = uid.unwrap_or(found.uid);
                found.gid = gid.unwrap_or(found.gid);
                match modified {
                    Some(TimeOrNow::SpecificTime(time)) => found.modified = time,
                    Some(TimeOrNow::Now) => found.modified = SystemTime::now(),
                    None => {}
                }
                reply.attr(&TTL, &attributes(inode.0, found));
            }
            Err(refusal) => reply.error(refusal.into()),
        }
    }

    fn mknod(
        &self,
        request: &Request,
        folder: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        _: u32,
        reply: ReplyEntry,
    ) {
        let made = self.make(request, folder, name, false, mode & !umask);
        self.entry(made, reply);
    }

    fn mkdir(
        &self,
        request: &Request,
        folder: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        reply: ReplyEntry,
    ) {
        let made = self.make(request, folder, name, true, mode & !umask);
        self.entry(made, reply);
    }

    fn create(
        &self,
        request: &Request,
        folder: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        _: i32,
        reply: ReplyCreate,
    ) {
        let made = self.make(request, folder, name, false, mode & !umask);
        let mut disk = lock(&self.disk);
        let opened = made.and_then(|number| disk.opened(number).map(|()| number));
        match opened.and_then(|number| Ok((number, disk.inode(number)?))) {
            Ok((number, inode)) => reply.created(
                &TTL,
                &attributes(number, inode),
                Generation(0),
                FileHandle(0),
                FopenFlags::empty(),
            ),
            Err(refusal) => reply.error(refusal.into()),
        }
    }

    fn link(&self, _: &Request, inode: INodeNo, folder: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let linked = lock(&self.disk).link(inode.0, folder.0, name);
        self.entry(linked.map(|()| inode.0), reply);
    }

    fn unlink(&self, _: &Request, folder: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        answer(lock(&self.disk).remove(folder.0, name, false), reply);
    }

    fn rmdir(&self, _: &Request, folder: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        answer(lock(&self.disk).remove(folder.0, name, true), reply);
    }

    fn rename(
        &self,
        _: &Request,
        folder: INodeNo,
        name: &OsStr,
        new_folder: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        if !flags.is_empty() {
            return reply.error(Errno::EINVAL);
        }
        let mut disk = lock(&self.disk);
        answer(disk.rename((folder.0, name), new_folder.0, new_name), reply);
    }

    fn open(&self, _: &Request, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let mut disk = lock(&self.disk);
        let truncates = flags.0 & OFlags::TRUNC.bits() as i32 != 0;
        let resized = match truncates {
            true => disk.resize(inode.0, 0),
            false => Ok(()),
        };
        match resized.and_then(|()| disk.opened(inode.0)) {
            Ok(()) => reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE),
            Err(refusal) => reply.error(refusal.into()),
        }
    }

    fn read(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let disk = lock(&self.disk);
        match disk.file(inode.0) {
            Ok(file) => {
                let from = file.live.len().min(offset as usize);
                let to = file.live.len().min(from + size as usize);
                reply.data(&file.live[from..to]);
            }
            Err(refusal) => reply.error(refusal.into()),
        }
    }

    fn write(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        flags: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let mut disk = lock(&self.disk);
        let written = disk.write(inode.0, offset as usize, data);
        let synced = written.and_then(|()| match is_synchronous(flags.0) {
            true => disk.sync_file(inode.0),
            false => Ok(()),
        });
        match synced {
            Ok(()) => reply.written(data.len() as u32),
            Err(refusal) => reply.error(refusal.into()),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn release(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        lock(&self.disk).closed(inode.0);
        reply.ok();
    }

    fn fsync(&self, _: &Request, inode: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        answer(lock(&self.disk).sync_file(inode.0), reply);
    }

    fn fsyncdir(&self, _: &Request, inode: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        answer(lock(&self.disk).sync_folder(inode.0), reply);
    }

    fn opendir(&self, _: &Request, inode: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let disk = lock(&self.disk);
        let folder = match disk.folder(inode.0) {
            Ok(folder) => folder,
            Err(refusal) => return reply.error(refusal.into()),
        };
        let mut entries = vec![
            (inode.0, FileType::Directory, ".".into()),
            (ROOT, FileType::Directory, "..".into()),
        ];
        for (name, number) in &folder.live {
            if let Ok(inode) = disk.inode(*number) {
                entries.push((*number, kind(inode), name.clone()));
            }
        }
        let handle = self.next.fetch_add(1, Ordering::Relaxed);
        lock(&self.folders).insert(handle, entries);
        reply.opened(FileHandle(handle), FopenFlags::empty());
    }

    fn readdir(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let folders = lock(&self.folders);
        let entries = folders.get(&handle.0).into_iter().flatten();
        for (at, (number, kind, name)) in entries.enumerate().skip(offset as usize) {
            if reply.add(INodeNo(*number), at as u64 + 1, *kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn releasedir(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        reply: ReplyEmpty,
    ) {
        lock(&self.folders).remove(&handle.0);
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let disk = lock(&self.disk);
        let all = disk.limit().min(SEEMING_SIZE) / BLOCK;
        let free = all.saturating_sub(disk.used() / BLOCK);
        reply.statfs(
            all,
            free,
            free,
            1 << 20,
            1 << 20,
            BLOCK as u32,
            255,
            BLOCK as u32,
        );
    }
}
