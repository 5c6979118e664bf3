//! Reading documents from files, in pieces: memory stays bounded whatever the files hold.

use crate::error::{DataError, Result};
use crate::pieces::{Piece, char_boundary, cut, pieces_of};
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

/// How much of a text file is read at a time, in bytes.
const READ_BYTES: usize = 1 << 20;
/// The longest line of a JSON lines file, in bytes: a line is held in memory whole.
const LONGEST_LINE: u64 = 64 << 20;

/// What a reader tells: the pieces it finds, and how many bytes it has read since it last told.
pub(crate) trait Sink {
    fn piece(&mut self, piece: Piece) -> Result<()>;
    fn read(&mut self, bytes: u64);
}

#[derive(serde::Deserialize)]
struct Line {
    text: String,
}

/// Reads one document a line from `{"text": ...}` objects; other fields and blank lines are passed over,
/// and so are empty texts.
pub(crate) fn read_json_lines(path: &Path, piece_bytes: usize, sink: &mut dyn Sink) -> Result<()> {
    let file = File::open(path).map_err(DataError::io("open", path))?;
    let mut reader = BufReader::with_capacity(READ_BYTES, file);
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        let limited = &mut (&mut reader).take(LONGEST_LINE + 1);
        let read = limited.read_until(b'\n', &mut line).map_err(DataError::io("read", path))?;
        let wrong = |problem| DataError::Input { path: path.to_path_buf(), line: number, problem };
        if read == 0 {
            break;
        }
        if read as u64 > LONGEST_LINE {
            return Err(wrong(format!("the line has more than {LONGEST_LINE} bytes: split the document")));
        }
        sink.read(read as u64);
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let Line { text } = serde_json::from_slice(&line)
            .map_err(|error| wrong(format!("expected a JSON object with a string \"text\": {error}")))?;
        if !text.is_empty() {
            pieces_of(&text, piece_bytes, &mut |piece| sink.piece(piece))?;
        }
    }
    Ok(())
}

/// Reads a UTF-8 text file: one document, or several with `separator` between them. Line breaks next to
/// a separator belong to it. Empty documents are passed over.
pub(crate) fn read_text(
    path: &Path,
    separator: Option<&str>,
    piece_bytes: usize,
    sink: &mut dyn Sink,
) -> Result<()> {
    let mut source = TextSource::open(path)?;
    let mut cutter = Cutter { separator, piece_bytes, pending: String::new(), begun: false };
    while source.fill(&mut cutter.pending, sink)? {
        cutter.give_what_is_sure(sink)?;
    }
    let rest = std::mem::take(&mut cutter.pending);
    cutter.end_document(&rest, sink)
}

/// Decodes a file as UTF-8 piecewise, keeping bytes of a character that a read has split.
struct TextSource<'a> {
    path: &'a Path,
    file: File,
    bytes: Vec<u8>,
    lines: u64,
}

impl<'a> TextSource<'a> {
    fn open(path: &'a Path) -> Result<Self> {
        let file = File::open(path).map_err(DataError::io("open", path))?;
        Ok(Self { path, file, bytes: Vec::new(), lines: 1 })
    }

    /// Appends the next stretch of text; false at the end of the file.
    fn fill(&mut self, text: &mut String, sink: &mut dyn Sink) -> Result<bool> {
        let mut limited = (&mut self.file).take(READ_BYTES as u64);
        let read = limited.read_to_end(&mut self.bytes).map_err(DataError::io("read", self.path))?;
        sink.read(read as u64);
        let (valid, invalid) = match std::str::from_utf8(&self.bytes) {
            Ok(valid) => (valid, false),
            Err(error) => {
                let (valid, _) = self.bytes.split_at(error.valid_up_to());
                // Without a length the character is merely cut off, which only the end of the file makes wrong.
                (std::str::from_utf8(valid).unwrap_or_default(), error.error_len().is_some() || read == 0)
            }
        };
        self.lines += valid.matches('\n').count() as u64;
        if invalid {
            let problem = "the text is not UTF-8 here: convert the file".to_string();
            return Err(DataError::Input { path: self.path.to_path_buf(), line: self.lines, problem });
        }
        text.push_str(valid);
        let used = valid.len();
        self.bytes.drain(..used);
        Ok(read > 0)
    }
}

/// Cuts text that arrives bit by bit into documents and pieces.
struct Cutter<'a> {
    separator: Option<&'a str>,
    piece_bytes: usize,
    pending: String,
    /// Whether the document under way has given a piece.
    begun: bool,
}

impl Cutter<'_> {
    /// Gives all documents and pieces that no further text can change.
    fn give_what_is_sure(&mut self, sink: &mut dyn Sink) -> Result<()> {
        let text = std::mem::take(&mut self.pending);
        let mut rest = text.as_str();
        if let Some(separator) = self.separator {
            while let Some((document, after)) = rest.split_once(separator) {
                self.end_document(document.trim_end_matches(['\r', '\n']), sink)?;
                rest = after;
            }
        }
        rest = self.trim_begin(rest);
        // The end of `rest` may be the beginning of a separator, so it is not cut up yet.
        let unsure = self.separator.map_or(0, str::len);
        let sure = |rest: &str| char_boundary(rest, rest.len().saturating_sub(unsure));
        while let Some(at) = cut(&rest[..sure(rest)], self.piece_bytes) {
            sink.piece(Piece { text: rest[..at].to_string(), last: false })?;
            self.begun = true;
            rest = &rest[at..];
        }
        self.pending = rest.to_string();
        Ok(())
    }

    /// With a separator, line breaks at a document's begin are not part of it.
    fn trim_begin<'t>(&self, text: &'t str) -> &'t str {
        if self.begun || self.separator.is_none() { text } else { text.trim_start_matches(['\r', '\n']) }
    }

    fn end_document(&mut self, text: &str, sink: &mut dyn Sink) -> Result<()> {
        let text = self.trim_begin(text);
        if self.begun || !text.is_empty() {
            pieces_of(text, self.piece_bytes, &mut |piece| sink.piece(piece))?;
        }
        self.begun = false;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    #[derive(Default)]
    struct Collected {
        documents: Vec<String>,
        open: Option<String>,
        bytes: u64,
    }

    impl Sink for Collected {
        fn piece(&mut self, piece: Piece) -> Result<()> {
            let document = self.open.take().unwrap_or_default() + &piece.text;
            if piece.last {
                self.documents.push(document)
            } else {
                self.open = Some(document)
            }
            Ok(())
        }

        fn read(&mut self, bytes: u64) {
            self.bytes += bytes;
        }
    }

    fn read(bytes: &[u8], read: impl Fn(&Path, &mut dyn Sink) -> Result<()>) -> Result<Collected> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        let mut collected = Collected::default();
        read(file.path(), &mut collected)?;
        assert_eq!((collected.bytes, &collected.open), (bytes.len() as u64, &None));
        Ok(collected)
    }

    proptest! {
        #[test]
        fn documents_between_separators_come_back(
            documents in prop::collection::vec("[a-c<|>\u{e9}]{1,20}( |\n)[a-c<|>\u{e9}]{1,20}", 1..12),
            piece_bytes in 4_usize..50,
        ) {
            let joined = documents.join("\n<|end|>\n");
            let separate = joined.matches("<|end|>").count() == documents.len() - 1;
            prop_assume!(separate);
            let found = read(joined.as_bytes(), |path, sink| read_text(path, Some("<|end|>"), piece_bytes, sink)).unwrap();
            prop_assert_eq!(found.documents, documents);
        }
    }

    /// Texts longer than a read, with characters and separators across its boundary.
    #[test]
    fn reads_may_split_characters_and_separators() {
        for shift in 0..12 {
            let long = format!("{}{}", "x".repeat(shift), "\u{4e2d}y\n".repeat(READ_BYTES / 5 - 1));
            let text = format!("{long}<|end|>{long}");
            let whole = read(text.as_bytes(), |path, sink| read_text(path, None, 5_000, sink)).unwrap();
            assert!(whole.documents == [text.clone()]);
            let parts =
                read(text.as_bytes(), |path, sink| read_text(path, Some("<|end|>"), 5_000, sink)).unwrap();
            assert!(parts.documents == [long.trim_end_matches('\n'), &long[..]]);
        }
    }

    #[test]
    fn files_without_separator_are_kept_to_the_byte() {
        let found = read(b"\n\n a \n", |path, sink| read_text(path, None, 100, sink)).unwrap();
        assert_eq!(found.documents, ["\n\n a \n"]);
        assert!(read(b"", |path, sink| read_text(path, None, 100, sink)).unwrap().documents.is_empty());
        let found = read(b"--\n--a--\n--", |path, sink| read_text(path, Some("--"), 100, sink)).unwrap();
        assert_eq!(found.documents, ["a"]);
    }

    #[test]
    fn text_that_is_not_utf8_is_named_by_line() {
        for bytes in [&b"a\nb\nc\xff\n"[..], b"a\nb\nc\xe4\xb8"] {
            let error = read(bytes, |path, sink| read_text(path, None, 100, sink)).err().unwrap();
            assert!(error.to_string().contains(":3: the text is not UTF-8"), "{error}");
        }
    }

    #[test]
    fn json_lines_pass_over_blanks_and_name_what_is_wrong() {
        let good = b"{\"text\":\"a\\nb\",\"more\":[{}]}\n\n \r\n{\"text\":\"\"}\n{\"text\":\"c\"}";
        let found = read(good, |path, sink| read_json_lines(path, 100, sink)).unwrap();
        assert_eq!(found.documents, ["a\nb", "c"]);
        for bad in ["{", "[]", "{\"txt\":\"a\"}", "{\"text\":7}", "{\"text\":\"\\ud800\"}"] {
            let bytes = format!("{{\"text\":\"a\"}}\n{bad}\n");
            let error = read(bytes.as_bytes(), |path, sink| read_json_lines(path, 100, sink)).err().unwrap();
            assert!(error.to_string().contains(":2: expected a JSON object"), "{error}");
        }
    }
}
