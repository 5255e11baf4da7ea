//! A disk that forgets: of each file and folder what is there now, and what a power cut leaves.
//!
//! Files and names have two states, *live* and *durable*. What is written is live; fsync makes it durable. A cut makes the live
//! state the durable one, plus, by seed, some of what was on its way: units of 512 or 4096 bytes of the pages that were not synced,
//! in any order, and the first so many of the changes of names and sizes, which are always kept in their order. How much more
//! a file system promises than POSIX does is said by [`Rules`]. Owners, modes and times are durable at once.
//!
//! No input and output, no clock: [`mount`](super::mount) shows it to the kernel.

use fastrand::Rng;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::time::SystemTime;

/// What is on its way to the disk is in pages, as in the kernel's cache.
const PAGE: usize = 4096;

pub const ROOT: u64 = 1;

/// What a file system promises beyond POSIX.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// fsync of any file makes all earlier changes of names and sizes durable, since these are in one journal. Otherwise a name
    /// needs an fsync of its folder.
    pub one_journal: bool,
    /// What was added to the end of a file appears from the front on. Otherwise it may have holes, which are read as zeros.
    pub ends_in_order: bool,
}

impl Rules {
    /// ext4 with `data=ordered`, its default.
    pub const EXT4: Rules = Rules {
        one_journal: true,
        ends_in_order: true,
    };
    pub const XFS: Rules = Rules {
        one_journal: true,
        ends_in_order: false,
    };
    pub const POSIX: Rules = Rules {
        one_journal: false,
        ends_in_order: false,
    };
}

/// Why an operation fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    NotFound,
    Exists,
    NotFolder,
    IsFolder,
    NotEmpty,
    Full,
}

pub type Result<T> = std::result::Result<T, Refusal>;

#[derive(Clone, Debug)]
pub struct Inode {
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub modified: SystemTime,
    /// How many live names lead to it, and how many have it open.
    links: u32,
    opens: u32,
    pub content: Content,
}

impl Inode {
    pub fn links(&self) -> u32 {
        self.links
    }
}

#[derive(Clone, Debug)]
pub enum Content {
    File(File),
    Folder(Folder),
}

#[derive(Clone, Debug, Default)]
pub struct File {
    pub live: Vec<u8>,
    durable: Vec<u8>,
    /// Pages of `live` that were written since they were synced.
    unsynced: BTreeSet<usize>,
}

#[derive(Clone, Debug, Default)]
pub struct Folder {
    pub live: BTreeMap<OsString, u64>,
    durable: BTreeMap<OsString, u64>,
}

/// Something on its way to the journal.
#[derive(Clone, Debug)]
enum Change {
    /// A name leads to this inode from now on, and the one it had before to none; or to none.
    Name {
        folder: u64,
        name: OsString,
        inode: Option<u64>,
        from: Option<(u64, OsString)>,
        /// It takes the place of a file: ext4 writes what is in the new one first (`auto_da_alloc`).
        replaces: bool,
    },
    Size {
        file: u64,
        size: usize,
    },
}

pub struct Disk {
    rules: Rules,
    inodes: BTreeMap<u64, Inode>,
    next: u64,
    pending: Vec<Change>,
    /// Bytes of all live files, and how many there may be.
    used: u64,
    limit: u64,
    /// Refused for want of room.
    pub refused: u64,
}

/// What a cut did, for the log.
#[derive(Debug, Default)]
pub struct Lost {
    pub unsynced_pages: usize,
    pub pages_kept: usize,
    pub changes: usize,
    pub changes_kept: usize,
}

impl Disk {
    pub fn new(rules: Rules) -> Disk {
        let root = Inode {
            mode: 0o755,
            uid: 0,
            gid: 0,
            modified: SystemTime::now(),
            links: 1,
            opens: 0,
            content: Content::Folder(Folder::default()),
        };
        Disk {
            rules,
            inodes: BTreeMap::from([(ROOT, root)]),
            next: ROOT + 1,
            pending: Vec::new(),
            used: 0,
            limit: u64::MAX,
            refused: 0,
        }
    }

    /// Room for so many bytes, `u64::MAX` for no limit; what is there stays.
    pub fn set_limit(&mut self, bytes: u64) {
        self.limit = bytes;
    }

    pub fn used(&self) -> u64 {
        self.used
    }

    pub fn limit(&self) -> u64 {
        self.limit
    }

    pub fn inode(&self, inode: u64) -> Result<&Inode> {
        self.inodes.get(&inode).ok_or(Refusal::NotFound)
    }

    pub fn inode_mut(&mut self, inode: u64) -> Result<&mut Inode> {
        self.inodes.get_mut(&inode).ok_or(Refusal::NotFound)
    }

    pub fn folder(&self, inode: u64) -> Result<&Folder> {
        match &self.inode(inode)?.content {
            Content::Folder(folder) => Ok(folder),
            Content::File(_) => Err(Refusal::NotFolder),
        }
    }

    fn folder_mut(&mut self, inode: u64) -> Result<&mut Folder> {
        match &mut self.inode_mut(inode)?.content {
            Content::Folder(folder) => Ok(folder),
            Content::File(_) => Err(Refusal::NotFolder),
        }
    }

    pub fn file(&self, inode: u64) -> Result<&File> {
        match &self.inode(inode)?.content {
            Content::File(file) => Ok(file),
            Content::Folder(_) => Err(Refusal::IsFolder),
        }
    }

    fn file_mut(&mut self, inode: u64) -> Result<&mut File> {
        match &mut self.inode_mut(inode)?.content {
            Content::File(file) => Ok(file),
            Content::Folder(_) => Err(Refusal::IsFolder),
        }
    }

    pub fn lookup(&self, folder: u64, name: &OsStr) -> Result<u64> {
        let names = &self.folder(folder)?.live;
        names.get(name).copied().ok_or(Refusal::NotFound)
    }

    /// A new file or folder.
    pub fn create(
        &mut self,
        folder: u64,
        name: &OsStr,
        is_folder: bool,
        mode: u16,
        (uid, gid): (u32, u32),
    ) -> Result<u64> {
        if self.lookup(folder, name).is_ok() {
            return Err(Refusal::Exists);
        }
        self.take_room(0, 1)?;
        let content = match is_folder {
            true => Content::Folder(Folder::default()),
            false => Content::File(File::default()),
        };
        let inode = self.next;
        self.next += 1;
        let new = Inode {
            mode,
            uid,
            gid,
            modified: SystemTime::now(),
            links: 0,
            opens: 0,
            content,
        };
        self.inodes.insert(inode, new);
        self.link(inode, folder, name)?;
        Ok(inode)
    }

    /// One more name.
    pub fn link(&mut self, inode: u64, folder: u64, name: &OsStr) -> Result<()> {
        if self.lookup(folder, name).is_ok() {
            return Err(Refusal::Exists);
        }
        self.inode_mut(inode)?.links += 1;
        self.set_name(folder, name, Some(inode), None, false)
    }

    pub fn remove(&mut self, folder: u64, name: &OsStr, is_folder: bool) -> Result<()> {
        let inode = self.lookup(folder, name)?;
        match &self.inode(inode)?.content {
            Content::File(_) if is_folder => return Err(Refusal::NotFolder),
            Content::Folder(_) if !is_folder => return Err(Refusal::IsFolder),
            Content::Folder(it) if !it.live.is_empty() => return Err(Refusal::NotEmpty),
            _ => {}
        }
        self.set_name(folder, name, None, None, false)?;
        self.unlink(inode);
        Ok(())
    }

    pub fn rename(&mut self, from: (u64, &OsStr), folder: u64, name: &OsStr) -> Result<()> {
        let inode = self.lookup(from.0, from.1)?;
        let replaced = self.lookup(folder, name).ok();
        if replaced == Some(inode) {
            return Ok(());
        }
        if let Some(Content::Folder(it)) = replaced.map(|it| &self.inodes[&it].content)
            && !it.live.is_empty()
        {
            return Err(Refusal::NotEmpty);
        }
        self.folder_mut(from.0)?.live.remove(from.1);
        let moved = Some((from.0, from.1.to_owned()));
        self.set_name(folder, name, Some(inode), moved, replaced.is_some())?;
        replaced.into_iter().for_each(|inode| self.unlink(inode));
        Ok(())
    }

    fn set_name(
        &mut self,
        folder: u64,
        name: &OsStr,
        inode: Option<u64>,
        from: Option<(u64, OsString)>,
        replaces: bool,
    ) -> Result<()> {
        let live = &mut self.folder_mut(folder)?.live;
        match inode {
            Some(inode) => live.insert(name.to_owned(), inode),
            None => live.remove(name),
        };
        self.inode_mut(folder)?.modified = SystemTime::now();
        self.pending.push(Change::Name {
            folder,
            name: name.to_owned(),
            inode,
            from,
            replaces,
        });
        Ok(())
    }

    fn unlink(&mut self, inode: u64) {
        if let Some(found) = self.inodes.get_mut(&inode) {
            found.links -= 1;
        }
        self.free(inode);
    }

    pub fn opened(&mut self, inode: u64) -> Result<()> {
        self.inode_mut(inode)?.opens += 1;
        Ok(())
    }

    pub fn closed(&mut self, inode: u64) {
        if let Some(found) = self.inodes.get_mut(&inode) {
            found.opens -= 1;
        }
        self.free(inode);
    }

    /// What nobody can reach any more takes no room; it is kept, since a cut may bring its name back.
    fn free(&mut self, inode: u64) {
        if let Some(found) = self.inodes.get_mut(&inode)
            && found.links == 0
            && found.opens == 0
            && let Content::File(file) = &found.content
        {
            self.used -= file.live.len() as u64;
        }
    }

    /// Room for a file that grows.
    fn take_room(&mut self, from: usize, to: usize) -> Result<()> {
        let grown = to.saturating_sub(from) as u64;
        if grown > 0 && self.used + grown > self.limit {
            self.refused += 1;
            return Err(Refusal::Full);
        }
        Ok(())
    }

    pub fn write(&mut self, inode: u64, at: usize, data: &[u8]) -> Result<()> {
        let size = self.file(inode)?.live.len();
        let end = at + data.len();
        self.take_room(size, end)?;
        let file = self.file_mut(inode)?;
        if end > size {
            file.live.resize(end, 0);
        }
        file.live[at..end].copy_from_slice(data);
        if !data.is_empty() {
            file.unsynced.extend(at / PAGE..end.div_ceil(PAGE));
        }
        self.used += end.saturating_sub(size) as u64;
        self.inode_mut(inode)?.modified = SystemTime::now();
        Ok(())
    }

    pub fn resize(&mut self, inode: u64, size: usize) -> Result<()> {
        let before = self.file(inode)?.live.len();
        self.take_room(before, size)?;
        let file = self.file_mut(inode)?;
        file.live.resize(size, 0);
        file.unsynced.retain(|page| page * PAGE < size);
        self.used = self.used - before as u64 + size as u64;
        self.inode_mut(inode)?.modified = SystemTime::now();
        if before != size {
            self.pending.push(Change::Size { file: inode, size });
        }
        Ok(())
    }

    /// fsync of a file.
    pub fn sync_file(&mut self, inode: u64) -> Result<()> {
        self.file(inode)?;
        if self.rules.one_journal {
            self.commit(|_| true);
        } else {
            self.commit(|change| matches!(change, Change::Size { file, .. } if *file == inode));
        }
        self.file_mut(inode)?.sync();
        Ok(())
    }

    /// fsync of a folder.
    pub fn sync_folder(&mut self, inode: u64) -> Result<()> {
        self.folder(inode)?;
        let all = self.rules.one_journal;
        self.commit(|change| {
            all || matches!(change, Change::Name { folder, .. } if *folder == inode)
        });
        Ok(())
    }

    /// Everything is durable.
    pub fn sync(&mut self) {
        self.commit(|_| true);
        for inode in self.inodes.values_mut() {
            if let Content::File(file) = &mut inode.content {
                file.sync();
            }
        }
    }

    fn commit(&mut self, which: impl Fn(&Change) -> bool) {
        let (due, rest): (Vec<Change>, Vec<Change>) = std::mem::take(&mut self.pending)
            .into_iter()
            .partition(which);
        self.pending = rest;
        due.into_iter().for_each(|change| self.make_durable(change));
        if self.pending.is_empty() {
            self.inodes.retain(|_, it| it.links + it.opens > 0);
        }
    }

    fn make_durable(&mut self, change: Change) {
        match change {
            Change::Name {
                folder,
                name,
                inode,
                from,
                replaces,
            } => {
                if let Some((folder, name)) = from
                    && let Ok(folder) = self.folder_mut(folder)
                {
                    folder.durable.remove(&name);
                }
                if replaces
                    && self.rules.one_journal
                    && let Some(Ok(file)) = inode.map(|inode| self.file_mut(inode))
                {
                    file.sync();
                }
                let Ok(folder) = self.folder_mut(folder) else {
                    return;
                };
                match inode {
                    Some(inode) => folder.durable.insert(name, inode),
                    None => folder.durable.remove(&name),
                };
            }
            Change::Size { file, size } => {
                if let Ok(file) = self.file_mut(file) {
                    file.durable.resize(size, 0);
                }
            }
        }
    }

    /// The power is gone: nothing has a file open, and what was not durable is lost, but for what a seed keeps.
    pub fn cut(&mut self, random: &mut Rng) -> Lost {
        let mut lost = Lost {
            changes: self.pending.len(),
            ..Lost::default()
        };
        let keeps_some = random.u32(0..3) > 0;
        let unit = if random.bool() { 512 } else { PAGE };
        // in one journal by their order; otherwise by that of each folder, and each file
        let mut kept: BTreeMap<Option<u64>, usize> = BTreeMap::new();
        let mut all: BTreeMap<Option<u64>, usize> = BTreeMap::new();
        let one = self.rules.one_journal;
        let place = move |change: &Change| match change {
            _ if one => None,
            Change::Name { folder, .. } => Some(*folder),
            Change::Size { file, .. } => Some(*file),
        };
        for change in &self.pending {
            *all.entry(place(change)).or_default() += 1;
        }
        for (place, count) in &all {
            let some = random.usize(0..=*count);
            kept.insert(*place, if keeps_some { some } else { 0 });
        }
        // such a file is as it was: what was written since went elsewhere on the disk
        let mut as_before = BTreeSet::new();
        for change in std::mem::take(&mut self.pending) {
            let left = kept.entry(place(&change)).or_default();
            if *left > 0 {
                *left -= 1;
                lost.changes_kept += 1;
                self.make_durable(change);
            } else if let Change::Size { file, .. } = change {
                as_before.insert(file);
            }
        }
        for (number, inode) in &mut self.inodes {
            inode.opens = 0;
            match &mut inode.content {
                Content::Folder(folder) => folder.live.clone_from(&folder.durable),
                Content::File(file) => {
                    let pages = file.unsynced.len();
                    lost.unsynced_pages += pages;
                    if keeps_some && !as_before.contains(number) {
                        lost.pages_kept += file.keep_some(unit, self.rules, random);
                    }
                    file.live.clone_from(&file.durable);
                    file.unsynced.clear();
                }
            }
        }
        self.drop_unreachable();
        lost
    }

    /// Counts names and room anew.
    fn drop_unreachable(&mut self) {
        let mut links: BTreeMap<u64, u32> = BTreeMap::from([(ROOT, 1)]);
        let mut todo = vec![ROOT];
        while let Some(inode) = todo.pop() {
            let Ok(folder) = self.folder(inode) else {
                continue;
            };
            for inode in folder.live.values() {
                *links.entry(*inode).or_default() += 1;
                todo.push(*inode);
            }
        }
        self.inodes.retain(|inode, _| links.contains_key(inode));
        self.used = 0;
        for (inode, found) in &mut self.inodes {
            found.links = links[inode];
            if let Content::File(file) = &found.content {
                self.used += file.live.len() as u64;
            }
        }
    }
}

impl File {
    fn sync(&mut self) {
        self.durable.resize(self.live.len(), 0);
        for page in std::mem::take(&mut self.unsynced) {
            self.keep(page * PAGE, (page + 1) * PAGE);
        }
    }

    /// What is written there is durable, as far as the durable file goes.
    fn keep(&mut self, from: usize, to: usize) {
        let to = to.min(self.durable.len()).min(self.live.len());
        if from < to {
            self.durable[from..to].copy_from_slice(&self.live[from..to]);
        }
    }

    /// Some of what is not synced becomes durable; how many pages' worth.
    fn keep_some(&mut self, unit: usize, rules: Rules, random: &mut Rng) -> usize {
        let share = [0.0, 0.5, 0.9, 1.0][random.usize(0..4)];
        let (before, size) = (self.durable.len(), self.live.len());
        let end = match random.u32(0..3) {
            _ if size <= before => before,
            0 => before,
            1 => size,
            // whole pages were written
            _ => (random.usize(before / PAGE..=size / PAGE) * PAGE).max(before),
        };
        self.durable.resize(end, 0);
        let mut kept = 0;
        for page in self.unsynced.clone() {
            for from in (page * PAGE..(page + 1) * PAGE).step_by(unit) {
                let to = from + unit;
                if rules.ends_in_order && to > before {
                    self.keep(from.max(before), to);
                    // what was there before may be older
                    if random.f64() < share {
                        self.keep(from, to);
                    }
                } else if random.f64() < share {
                    self.keep(from, to);
                    kept += unit;
                }
            }
        }
        kept / PAGE + (end - before) / PAGE
    }
}

#[cfg(test)]
mod tests;
