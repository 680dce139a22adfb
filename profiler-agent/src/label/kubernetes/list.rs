//! Takes apart what the API server sends, as it arrives: lists into their items, watches into their lines.
//!
//! A list of a node's pods takes megabytes, and an item some kilobytes: none but the item that is arriving is held.

/// Bytes of one object, as JSON: etcd takes no more than 1.5 MiB of it in its own form.
pub(super) const MAX_OBJECT: usize = 4 << 20;
/// Bytes of what a list says besides its items.
const MAX_SHELL: usize = 64 << 10;

/// An object that is arriving; one that grows too large is not kept, but counted.
#[derive(Debug, Default)]
struct Piece {
    bytes: Vec<u8>,
    is_too_large: bool,
}

impl Piece {
    fn extend(&mut self, bytes: &[u8]) {
        if self.bytes.len() + bytes.len() > MAX_OBJECT {
            self.is_too_large = true;
            self.bytes = Vec::new();
        } else if !self.is_too_large {
            self.bytes.extend_from_slice(bytes);
        }
    }

    /// Hands it on, and is empty again.
    fn finish(&mut self, mut take: impl FnMut(&[u8])) -> bool {
        let is_whole = !self.is_too_large;
        if is_whole {
            take(&self.bytes);
        }
        self.is_too_large = false;
        self.bytes.clear();
        // One large object does not keep its room for ever.
        self.bytes.shrink_to(64 << 10);
        is_whole
    }
}

/// The items of a list (`{…, "items": [{…}, {…}]}`) as they arrive.
#[derive(Debug, Default)]
pub(crate) struct Items {
    /// What encloses the byte that comes next: braces and brackets.
    open: Vec<u8>,
    in_string: bool,
    is_escaped: bool,
    item: Piece,
    /// The list without its items.
    shell: Vec<u8>,
    /// Items that were too large.
    refused: u64,
}

/// Deeper than serde_json reads.
const MAX_DEPTH: usize = 128;

impl Items {
    /// Takes more of the list, and hands on every item that is whole. `Err`: it cannot be a list.
    pub(crate) fn push(&mut self, bytes: &[u8], mut take: impl FnMut(&[u8])) -> Result<(), &'static str> {
        // Where the part of the item begins that was not copied yet.
        let mut start = 0;
        for (index, &byte) in bytes.iter().enumerate() {
            let was_in_item = self.is_in_item();
            self.step(byte)?;
            match (was_in_item, self.is_in_item()) {
                (false, true) => start = index,
                (true, false) => {
                    self.item.extend(&bytes[start..=index]);
                    self.refused += u64::from(!self.item.finish(&mut take));
                }
                (false, false) if !(byte == b',' && self.open == b"{[") => {
                    if self.shell.len() == MAX_SHELL {
                        return Err("a list says too much besides its items");
                    }
                    self.shell.push(byte);
                }
                _ => {}
            }
        }
        if self.is_in_item() {
            self.item.extend(&bytes[start..]);
        }
        Ok(())
    }

    /// What the list says besides its items, once it has ended, and how many items were too large.
    pub(crate) fn finish(self) -> (Vec<u8>, u64) {
        (self.shell, self.refused)
    }

    /// Objects in an array of the outermost object are items.
    fn is_in_item(&self) -> bool {
        self.open.starts_with(b"{[{")
    }

    fn step(&mut self, byte: u8) -> Result<(), &'static str> {
        if self.in_string {
            self.in_string = self.is_escaped || byte != b'"';
            self.is_escaped = !self.is_escaped && byte == b'\\';
            return Ok(());
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' if self.open.len() == MAX_DEPTH => return Err("a list nests too deep"),
            b'{' | b'[' => self.open.push(byte),
            // (The bracket after the opening one in ASCII, and after that.)
            b'}' | b']' if self.open.pop() != Some(byte - 2) => return Err("a list has brackets without partners"),
            _ => {}
        }
        Ok(())
    }
}

/// The lines of a watch as they arrive.
#[derive(Debug, Default)]
pub(super) struct Lines {
    line: Piece,
}

impl Lines {
    /// Takes more of the watch, and hands on every line that is whole. Tells how many were too large.
    pub(crate) fn push(&mut self, bytes: &[u8], mut take: impl FnMut(&[u8])) -> u64 {
        let mut refused = 0;
        let mut pieces = bytes.split(|&byte| byte == b'\n').peekable();
        while let Some(piece) = pieces.next() {
            self.line.extend(piece);
            if pieces.peek().is_some() {
                refused += u64::from(!self.line.finish(|line| {
                    if !line.trim_ascii().is_empty() {
                        take(line);
                    }
                }));
            }
        }
        refused
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Items come whole and in order, however the list is cut; what is left is valid without them.
    #[test]
    fn lists_come_apart() {
        let list = br#"{"kind":"PodList","metadata":{"resourceVersion":"7","x":[1,2]},
            "items":[{"a":"}]\\"},{"b":[{"c":"\"{"}]} , {}],"more":{"d":[]}}"#;
        for size in 1..list.len() {
            let mut items = Items::default();
            let mut found = Vec::new();
            for piece in list.chunks(size) {
                items.push(piece, |item| found.push(String::from_utf8_lossy(item).into_owned())).expect("a list");
            }
            assert_eq!(found, [r#"{"a":"}]\\"}"#, r#"{"b":[{"c":"\"{"}]}"#, "{}"], "in pieces of {size}");
            let shell: serde_json::Value = serde_json::from_slice(&items.finish().0).expect("valid");
            assert_eq!(shell["metadata"]["resourceVersion"], "7");
            assert_eq!(shell["items"], serde_json::json!([]));
        }
    }

    /// What cannot be a list is refused; what is too large is passed over.
    #[test]
    fn lists_are_bounded() {
        let mut items = Items::default();
        items.push(br#"{"items":[{"a":""#, |_| ()).expect("a beginning");
        for _ in 0..5 {
            items.push(&[b'x'; 1 << 20], |_| ()).expect("more of it");
        }
        assert!(items.item.bytes.capacity() <= MAX_OBJECT);
        let mut found = 0;
        items.push(br#""},{"b":1}]}"#, |_| found += 1).expect("its end");
        assert_eq!((found, items.finish().1), (1, 1));
        assert!(Items::default().push(b"{]", |_| ()).is_err());
        assert!(Items::default().push(b"}", |_| ()).is_err());
        assert!(Items::default().push(&[b'['; 200], |_| ()).is_err());
        assert!(Items::default().push(&[b' '; MAX_SHELL + 1], |_| ()).is_err());
    }

    /// Lines come whole; empty ones do not; one that is too large is passed over.
    #[test]
    fn watches_come_apart() {
        let watch = b"one\n\ntwo\r\nthree";
        for size in 1..watch.len() {
            let mut lines = Lines::default();
            let mut found = Vec::new();
            for piece in watch.chunks(size) {
                lines.push(piece, |line| found.push(String::from_utf8_lossy(line).trim().to_owned()));
            }
            assert_eq!(found, ["one", "two"], "in pieces of {size}");
        }
        let mut lines = Lines::default();
        let mut refused = 0;
        for _ in 0..5 {
            refused += lines.push(&[b'x'; 1 << 20], |_| ());
        }
        let mut found = Vec::new();
        refused += lines.push(b"x\nnext\n", |line| found.push(line.to_vec()));
        assert_eq!((refused, found), (1, vec![b"next".to_vec()]));
    }
}
