//! The write-ahead log of a data directory, read from its files.
//!
//! Layouts: `access/xlog_internal.h` (pages), `access/xlogrecord.h` (records) and
//! `catalog/pg_control.h`, the same in versions 13 to 18. Where the log is not read in full
//! certainty the answer is an error, never a guess.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Size of a page, `XLOG_BLCKSZ`, which nobody builds otherwise.
const PAGE: u64 = 8192;
/// Headers: of a page, of the first page of a file, of a record.
const SHORT_HEADER: u64 = 24;
const LONG_HEADER: u64 = 40;
const RECORD_HEADER: usize = 24;
/// `XLP_FIRST_IS_CONTRECORD` and the other bits that a page of a cluster in order may bear:
/// `XLP_LONG_HEADER`, `XLP_BKP_REMOVABLE`.
const CONTINUES: u16 = 1;
const KNOWN_BITS: u16 = CONTINUES | 2 | 4;
/// `XLogRecordMaxSize`.
const RECORD_MAX: u32 = 1020 << 20;

/// What recovery reads first, from `global/pg_control`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Control {
    pub(super) system: u64,
    /// Where the last checkpoint's record lies.
    pub(super) checkpoint: u64,
    /// Where recovery would begin.
    pub(super) redo: u64,
    pub(super) timeline: u32,
}

impl Control {
    pub(super) fn read(data_dir: &Path) -> io::Result<Self> {
        let file = fs::read(data_dir.join("global/pg_control"))?;
        if file.len() < 64 || !(1300..1900).contains(&u32_at(&file, 8)) {
            return Err(odd("the control file has an unknown layout"));
        }
        Ok(Self {
            system: u64_at(&file, 0),
            checkpoint: u64_at(&file, 32),
            redo: u64_at(&file, 40),
            timeline: u32_at(&file, 48),
        })
    }
}

/// One record, as far as its header tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) start: u64,
    /// Where the record before it starts.
    pub(super) previous: u64,
    /// The resource manager (`access/rmgrlist.h`) and its kind of record, without flags.
    pub(super) manager: u8,
    pub(super) kind: u8,
}

/// The log of one data directory, on its current timeline.
#[derive(Debug)]
pub(super) struct Log {
    folder: PathBuf,
    control: Control,
    file_bytes: u64,
}

impl Log {
    pub(super) fn open(data_dir: &Path, control: Control) -> io::Result<Self> {
        let folder = data_dir.join("pg_wal");
        let mut file_bytes = 0;
        for entry in fs::read_dir(&folder)? {
            let entry = entry?;
            if is_file_of_log(&entry.file_name().to_string_lossy()) {
                file_bytes = entry.metadata()?.len();
                break;
            }
        }
        if !file_bytes.is_power_of_two() || !(PAGE..=1 << 30).contains(&file_bytes) {
            return Err(odd("no file of the log is there, or one of no known size"));
        }
        Ok(Self {
            folder,
            control,
            file_bytes,
        })
    }

    /// The last page that was written, searched from the redo position on.
    fn last_page(&self) -> io::Result<u64> {
        let mut file = self.control.redo - self.control.redo % self.file_bytes;
        // Files and pages are written in order and name their position; what lies behind the last
        // one are zeros, or the names of an earlier use.
        while self.is_written(file + self.file_bytes)? {
            file += self.file_bytes;
        }
        let (mut written, mut beyond) = (0, self.file_bytes / PAGE);
        while written < beyond {
            let page = written.midpoint(beyond);
            if self.is_written(file + page * PAGE)? {
                written = page + 1;
            } else {
                beyond = page;
            }
        }
        match written {
            0 => Err(odd("the log does not reach its redo position")),
            pages => Ok(file + (pages - 1) * PAGE),
        }
    }

    /// Where the log ends and the next record would begin, with the start of the last record if
    /// that lies on the last page.
    pub(super) fn end(&self) -> io::Result<(u64, Option<u64>)> {
        let address = self.last_page()?;
        let page = self.page(address)?.ok_or_else(|| odd("a page is gone"))?;
        let body = self.header_bytes(address);
        let rest = if u16_at(&page, 2) & CONTINUES == 0 {
            0
        } else {
            aligned(u64::from(u32_at(&page, 16)))
        };
        if rest > PAGE - body {
            return Err(odd("the last record is incomplete"));
        }
        let mut reader = self.reader(self.past_header(address + body + rest));
        let mut last = None;
        while let Some(record) = reader.next()? {
            last = Some(record.start);
        }
        Ok((reader.at, last))
    }

    /// Reads records from the position of one.
    pub(super) fn reader(&self, at: u64) -> Reader<'_> {
        Reader {
            log: self,
            at,
            page: None,
        }
    }

    fn is_written(&self, address: u64) -> io::Result<bool> {
        let mut found = [0; 8];
        Ok(self.read(address, 8, &mut found)? && u64::from_ne_bytes(found) == address)
    }

    /// A page that was written, checked; none where nothing was written yet.
    fn page(&self, address: u64) -> io::Result<Option<Vec<u8>>> {
        let mut page = vec![0; usize::try_from(PAGE).expect("a page fits")];
        if !self.read(address, 0, &mut page)? || u64_at(&page, 8) != address {
            return Ok(None);
        }
        let (magic, bits) = (u16_at(&page, 0), u16_at(&page, 2));
        let is_first = address.is_multiple_of(self.file_bytes);
        let long_fits = !is_first
            || (u64_at(&page, 24) == self.control.system
                && u64::from(u32_at(&page, 32)) == self.file_bytes
                && u64::from(u32_at(&page, 36)) == PAGE);
        if magic >> 8 == 0xd1
            && bits & !KNOWN_BITS == 0
            && (bits & 2 != 0) == is_first
            && u32_at(&page, 4) == self.control.timeline
            && long_fits
        {
            Ok(Some(page))
        } else {
            Err(odd("a page has an unknown header"))
        }
    }

    /// Fills the buffer from the log's files. False where there is no such file.
    fn read(&self, address: u64, skip: u64, buffer: &mut [u8]) -> io::Result<bool> {
        let in_each = (1 << 32) / self.file_bytes;
        let number = address / self.file_bytes;
        let name = format!(
            "{:08X}{:08X}{:08X}",
            self.control.timeline,
            number / in_each,
            number % in_each
        );
        match fs::File::open(self.folder.join(name)) {
            Ok(file) => file.read_exact_at(buffer, address % self.file_bytes + skip)?,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(e),
        }
        Ok(true)
    }

    fn header_bytes(&self, page: u64) -> u64 {
        if page.is_multiple_of(self.file_bytes) {
            LONG_HEADER
        } else {
            SHORT_HEADER
        }
    }

    /// At a page's start, the first position behind its header; any other position as it is.
    fn past_header(&self, at: u64) -> u64 {
        if at.is_multiple_of(PAGE) {
            at + self.header_bytes(at)
        } else {
            at
        }
    }
}

/// Goes from record to record. Its position is always one where a record may begin.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    log: &'a Log,
    at: u64,
    page: Option<(u64, Vec<u8>)>,
}

impl Reader<'_> {
    /// The next record; none at a clean end, where all of the page behind is zero. Anything else,
    /// as a record that was just being written, is an error.
    pub(super) fn next(&mut self) -> io::Result<Option<Record>> {
        let start = self.at;
        let is_first = self.log.past_header(start - start % PAGE) == start;
        let Some(page) = self.page_at(start)? else {
            return Ok(None);
        };
        let within = usize::try_from(start % PAGE).expect("less than a page");
        if is_first && u16_at(page, 2) & CONTINUES != 0 {
            return Err(odd("a record continues where one should begin"));
        }
        let length = u32_at(page, within);
        if length == 0 {
            return if page[within..].iter().all(|byte| *byte == 0) {
                Ok(None)
            } else {
                Err(odd("something follows the last record"))
            };
        }
        if !(24..=RECORD_MAX).contains(&length) {
            return Err(odd("a record has an impossible length"));
        }
        let header = self.pass(length)?;
        self.at = self.log.past_header(aligned(self.at));
        Ok(Some(Record {
            start,
            previous: u64_at(&header, 8),
            manager: header[17],
            kind: header[16] & 0xf0,
        }))
    }

    /// Moves past the record that begins here, over as many pages as it has, and returns its header.
    fn pass(&mut self, length: u32) -> io::Result<[u8; RECORD_HEADER]> {
        let mut header = [0; RECORD_HEADER];
        let (mut seen, mut left) = (0, u64::from(length));
        loop {
            let (at, first) = (self.at, left == u64::from(length));
            let within = if first { at } else { self.log.past_header(at) } % PAGE;
            let page = self
                .page_at(at)?
                .ok_or_else(|| odd("the last record is incomplete"))?;
            let continues = u16_at(page, 2) & CONTINUES != 0 && u64::from(u32_at(page, 16)) == left;
            if !first && !continues {
                return Err(odd("a record does not continue on its next page"));
            }
            let here = left.min(PAGE - within);
            let (from, to) = (
                usize::try_from(within).expect("less than a page"),
                usize::try_from(within + here).expect("a page at most"),
            );
            let taken = (RECORD_HEADER - seen).min(to - from);
            header[seen..seen + taken].copy_from_slice(&page[from..from + taken]);
            seen += taken;
            left -= here;
            self.at = at - at % PAGE + within + here;
            if left == 0 {
                return Ok(header);
            }
        }
    }

    fn page_at(&mut self, at: u64) -> io::Result<Option<&[u8]>> {
        let address = at - at % PAGE;
        if self
            .page
            .as_ref()
            .is_none_or(|(known, _)| *known != address)
        {
            self.page = self.log.page(address)?.map(|page| (address, page));
        }
        Ok(self.page.as_ref().map(|(_, page)| page.as_slice()))
    }
}

/// `0000000100000002000000AB`: timeline, then the two parts of the position.
fn is_file_of_log(name: &str) -> bool {
    name.len() == 24 && name.bytes().all(|b| b.is_ascii_hexdigit())
}

/// The next position that is aligned as records are.
fn aligned(at: u64) -> u64 {
    at.next_multiple_of(8)
}

fn odd(what: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, what)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_ne_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: usize = 1 << 20;
    const PAGE: usize = 8192;
    /// The second file, of which the control file knows.
    const START: usize = 2 * FILE;

    /// A cluster whose log holds records of these lengths, and the positions of their starts.
    fn cluster(lengths: &[usize]) -> (tempfile::TempDir, Vec<u64>, usize) {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("global")).unwrap();
        fs::create_dir(dir.path().join("pg_wal")).unwrap();
        let mut control = vec![0; 8192];
        control[8..12].copy_from_slice(&1300u32.to_ne_bytes());
        control[40..48].copy_from_slice(&(START as u64 + 40).to_ne_bytes());
        control[48..52].copy_from_slice(&1u32.to_ne_bytes());
        fs::write(dir.path().join("global/pg_control"), control).unwrap();

        let mut file = vec![0; FILE];
        let header = |file: &mut [u8], page: usize, left: usize| {
            let (first, continues) = (page == 0, left > 0);
            file[page..page + 2].copy_from_slice(&0xd110u16.to_ne_bytes());
            let bits = u16::from(continues) | u16::from(first) << 1;
            file[page + 2..page + 4].copy_from_slice(&bits.to_ne_bytes());
            file[page + 4..page + 8].copy_from_slice(&1u32.to_ne_bytes());
            let address = (START + page) as u64;
            file[page + 8..page + 16].copy_from_slice(&address.to_ne_bytes());
            let left = u32::try_from(left).unwrap();
            file[page + 16..page + 20].copy_from_slice(&left.to_ne_bytes());
            if first {
                file[32..36].copy_from_slice(&u32::try_from(FILE).unwrap().to_ne_bytes());
                file[36..40].copy_from_slice(&8192u32.to_ne_bytes());
                40
            } else {
                24
            }
        };
        let (mut starts, mut previous) = (Vec::new(), 0u64);
        let mut at: usize = header(&mut file, 0, 0);
        for length in lengths {
            if at.is_multiple_of(PAGE) {
                at += header(&mut file, at, 0);
            }
            let start = (START + at) as u64;
            let mut record = vec![7; *length];
            record[..4].copy_from_slice(&u32::try_from(*length).unwrap().to_ne_bytes());
            record[8..16].copy_from_slice(&previous.to_ne_bytes());
            for (n, byte) in record.iter().enumerate() {
                if at.is_multiple_of(PAGE) {
                    at += header(&mut file, at, length - n);
                }
                file[at] = *byte;
                at += 1;
            }
            at = at.next_multiple_of(8);
            starts.push(start);
            previous = start;
        }
        fs::write(dir.path().join("pg_wal/000000010000000000000002"), file).unwrap();
        (dir, starts, at)
    }

    fn log(dir: &tempfile::TempDir) -> io::Result<Log> {
        Log::open(dir.path(), Control::read(dir.path())?)
    }

    fn change(dir: &tempfile::TempDir, at: usize, bytes: &[u8]) {
        let path = dir.path().join("pg_wal/000000010000000000000002");
        let file = fs::OpenOptions::new().write(true).open(path).unwrap();
        file.write_all_at(bytes, at as u64).unwrap();
    }

    #[test]
    fn records_are_found_over_pages_to_the_end() {
        for lengths in [
            &[100, 24, 8000, 30_000, 55][..],
            &[8192 - 40],
            &[8192 - 40 - 8, 100],
            &[100_000],
        ] {
            let (dir, starts, end) = cluster(lengths);
            let log = log(&dir).unwrap();
            let mut reader = log.reader(START as u64 + 40);
            let mut found = Vec::new();
            while let Some(record) = reader.next().unwrap() {
                assert_eq!(record.previous, found.last().copied().unwrap_or(0));
                assert_eq!((record.manager, record.kind), (7, 0));
                found.push(record.start);
            }
            assert_eq!(found, starts);
            let end = log.past_header((START + end) as u64);
            assert_eq!((reader.at, log.end().unwrap().0), (end, end), "{lengths:?}");
        }
    }

    #[test]
    fn a_log_that_ends_unclearly_is_an_error() {
        let (dir, _, end) = cluster(&[100, 24]);
        change(&dir, end + 900, &[1]);
        let error = log(&dir).unwrap().end().unwrap_err();
        assert!(error.to_string().contains("follows"), "{error}");

        // Its last page did not reach the disk.
        let (dir, starts, _) = cluster(&[100, 9000]);
        change(&dir, PAGE, &[0; 64]);
        assert_eq!(starts.len(), 2);
        let error = log(&dir).unwrap().end().unwrap_err();
        assert!(error.to_string().contains("incomplete"), "{error}");

        let (dir, ..) = cluster(&[100, 9000]);
        change(&dir, PAGE + 16, &[3]);
        let error = log(&dir).unwrap().reader(START as u64 + 40 + 104).next();
        assert!(error.unwrap_err().to_string().contains("continue"));

        let (dir, ..) = cluster(&[100]);
        change(&dir, 1, &[0xd2]);
        assert!(log(&dir).unwrap().end().is_err(), "an unknown format");
    }

    #[test]
    fn an_unknown_control_file_is_an_error() {
        let (dir, ..) = cluster(&[100]);
        fs::write(dir.path().join("global/pg_control"), [0; 20]).unwrap();
        assert!(log(&dir).is_err());
    }
}
