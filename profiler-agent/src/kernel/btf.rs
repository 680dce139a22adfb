//! Finds struct members in the running kernel's type information (BTF).
//!
//! One pass over the raw section, keeping only the asked-for structs: the kernel describes more than a
//! hundred thousand types, and a general parser would keep them all in memory for two dozen offsets.
//! The format is that of the kernel's `include/uapi/linux/btf.h`.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
};

use thiserror::Error;

const MAGIC: u16 = 0xeb9f;
const KIND_INT: u32 = 1;
const KIND_ARRAY: u32 = 3;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_ENUM: u32 = 6;
const KIND_FUNC: u32 = 12;
const KIND_FUNC_PROTO: u32 = 13;
const KIND_VAR: u32 = 14;
const KIND_DATASEC: u32 = 15;
const KIND_DECL_TAG: u32 = 17;
const KIND_ENUM64: u32 = 19;
/// The one enumeration whose numbers are asked for.
const CONTROLLERS: &str = "cgroup_subsys_id";
/// Most members looked at to find one. The largest struct of a kernel has some hundreds.
const MAX_MEMBERS_SEARCHED: u32 = 1 << 16;

/// Why a layout could not be read.
#[derive(Debug, Error)]
pub enum BtfError {
    /// The file is not there: a kernel without `CONFIG_DEBUG_INFO_BTF`.
    #[error(
        "this kernel has no type information at {path}: {error}; \
         a kernel built with CONFIG_DEBUG_INFO_BTF=y is needed (Linux 5.10 or later)"
    )]
    Unreadable {
        /// Where it was looked for.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// The file is not BTF, or ends early.
    #[error("{path} is not valid kernel type information (BTF): {what}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
}

/// One member of a struct or union.
#[derive(Clone, Copy)]
struct Member {
    name_offset: u32,
    type_id: u32,
    bit_offset: u32,
}

/// The structs of a BTF section, by name and by type ID.
pub struct KernelTypes {
    strings: Vec<u8>,
    structs: HashMap<String, u32>,
    /// Members of every struct and union, by type ID.
    members: HashMap<u32, Vec<Member>>,
    /// Parameters of each function that was asked for.
    functions: HashMap<String, usize>,
    /// Numbers of the controllers of cgroups, by the names that the kernel gives them.
    enumerators: HashMap<String, u32>,
}

impl KernelTypes {
    /// Reads the structs named in `wanted` (and every unnamed one, since they nest), and which of the
    /// functions named in `functions` exist.
    pub fn read(path: &Path, wanted: &[&str], functions: &[&str]) -> Result<Self, BtfError> {
        let bytes = fs::read(path).map_err(|error| BtfError::Unreadable { path: path.to_owned(), error })?;
        Self::parse(&bytes, wanted, functions)
            .ok_or(BtfError::Malformed { path: path.to_owned(), what: "the section is truncated or inconsistent" })
    }

    pub(super) fn parse(bytes: &[u8], wanted: &[&str], wanted_functions: &[&str]) -> Option<Self> {
        let word = |at: usize| -> Option<u32> { Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?)) };
        if u16::from_le_bytes(bytes.get(..2)?.try_into().ok()?) != MAGIC {
            return None;
        }
        let header_len = word(4)? as usize;
        let types_start = header_len.checked_add(word(8)? as usize)?;
        let types_end = types_start.checked_add(word(12)? as usize)?;
        let strings_start = header_len.checked_add(word(16)? as usize)?;
        let strings_end = strings_start.checked_add(word(20)? as usize)?;
        let strings = bytes.get(strings_start..strings_end)?.to_vec();
        bytes.get(types_start..types_end)?;

        let mut found = Self {
            strings,
            structs: HashMap::new(),
            members: HashMap::new(),
            functions: HashMap::new(),
            enumerators: HashMap::new(),
        };
        // Functions refer to their parameters by type ID, which may come later.
        let mut parameters: Vec<(u32, usize)> = Vec::new();
        let mut function_types: Vec<(String, u32)> = Vec::new();
        let mut at = types_start;
        let mut type_id = 1u32;
        while at < types_end {
            let name_offset = word(at)?;
            let info = word(at + 4)?;
            let size_or_type = word(at + 8)?;
            let (kind, entries, bitfields) = (info >> 24 & 0x1f, (info & 0xffff) as usize, info >> 31 == 1);
            at += 12;
            match kind {
                KIND_STRUCT | KIND_UNION => {
                    let name = found.string(name_offset)?;
                    if name.is_empty() || wanted.contains(&name) {
                        if kind == KIND_STRUCT && !name.is_empty() {
                            found.structs.insert(name.to_owned(), type_id);
                        }
                        let mut members = Vec::with_capacity(entries);
                        for entry in 0..entries {
                            let offset = word(at + entry * 12 + 8)?;
                            members.push(Member {
                                name_offset: word(at + entry * 12)?,
                                type_id: word(at + entry * 12 + 4)?,
                                bit_offset: if bitfields { offset & 0xff_ffff } else { offset },
                            });
                        }
                        found.members.insert(type_id, members);
                    }
                    at += entries * 12;
                }
                KIND_FUNC => {
                    let name = found.string(name_offset)?;
                    if wanted_functions.contains(&name) {
                        function_types.push((name.to_owned(), size_or_type));
                    }
                }
                KIND_INT | KIND_VAR | KIND_DECL_TAG => at += 4,
                KIND_ARRAY => at += 12,
                KIND_ENUM => {
                    if found.string(name_offset)? == CONTROLLERS {
                        for entry in 0..entries {
                            let name = found.string(word(at + entry * 8)?)?.to_owned();
                            found.enumerators.insert(name, word(at + entry * 8 + 4)?);
                        }
                    }
                    at += entries * 8;
                }
                KIND_FUNC_PROTO => {
                    parameters.push((type_id, entries));
                    at += entries * 8;
                }
                KIND_DATASEC | KIND_ENUM64 => at += entries * 12,
                // PTR, FWD, TYPEDEF, VOLATILE, CONST, RESTRICT, FLOAT, TYPE_TAG have no further data.
                2 | 7..=11 | 16 | 18 => {}
                _ => return None,
            }
            type_id += 1;
        }
        for (name, prototype) in function_types {
            let index = parameters.binary_search_by_key(&prototype, |&(id, _)| id).ok()?;
            found.functions.insert(name, parameters[index].1);
        }
        Some(found)
    }

    fn string(&self, offset: u32) -> Option<&str> {
        let bytes = self.strings.get(offset as usize..)?;
        let end = bytes.iter().position(|&byte| byte == 0)?;
        std::str::from_utf8(&bytes[..end]).ok()
    }

    /// Whether the kernel has a function of this name (among those asked for).
    pub fn has_function(&self, name: &str) -> bool {
        self.functions.contains_key(name)
    }

    /// How many parameters a function has (among those asked for).
    pub fn parameters(&self, function: &str) -> Option<usize> {
        self.functions.get(function).copied()
    }

    /// The number of a controller of cgroups: `pids_cgrp_id`. Which there are is a choice of whoever built the kernel.
    pub fn enumerator(&self, name: &str) -> Option<u32> {
        self.enumerators.get(name).copied()
    }

    /// Byte offset of `member` in `structure`, looking into unnamed structs and unions as C does.
    pub fn offset(&self, structure: &str, member: &str) -> Option<u32> {
        let mut left = MAX_MEMBERS_SEARCHED;
        self.offset_in(*self.structs.get(structure)?, member, 8, &mut left)
    }

    /// Looks into `depth` levels of unnamed types and at no more than `left` members: a type may hold itself, many
    /// times.
    fn offset_in(&self, type_id: u32, member: &str, depth: u32, left: &mut u32) -> Option<u32> {
        let depth = depth.checked_sub(1)?;
        self.members.get(&type_id)?.iter().find_map(|candidate| {
            *left = left.checked_sub(1)?;
            let name = self.string(candidate.name_offset)?;
            let inner = if name == member {
                0
            } else if name.is_empty() {
                self.offset_in(candidate.type_id, member, depth, left)?
            } else {
                return None;
            };
            (candidate.bit_offset / 8).checked_add(inner)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Builds a BTF section from raw type words and strings.
    fn section(types: &[u32], strings: &str) -> Vec<u8> {
        let types_len = types.len() as u32 * 4;
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&MAGIC.to_le_bytes());
        bytes.extend_from_slice(&[1, 0]);
        for word in [24, 0, types_len, types_len, strings.len() as u32] {
            bytes.extend_from_slice(&u32::to_le_bytes(word));
        }
        bytes.extend(types.iter().flat_map(|word| word.to_le_bytes()));
        bytes.extend_from_slice(strings.as_bytes());
        bytes
    }

    const fn info(kind: u32, entries: u32) -> u32 {
        kind << 24 | entries
    }

    /// A member inside an unnamed union is found at the sum of the offsets.
    #[test]
    fn looks_into_unnamed_unions() {
        // struct task { int a; union { int b; }; }
        let strings = "\0task\0a\0b\0";
        let types = [
            // 1: struct task, two members
            1,
            info(KIND_STRUCT, 2),
            16,
            /* a */ 6,
            0,
            0,
            /* unnamed */ 0,
            2,
            64,
            // 2: unnamed union, one member
            0,
            info(KIND_UNION, 1),
            8,
            /* b */ 8,
            0,
            32,
        ];
        let types = KernelTypes::parse(&section(&types, strings), &["task"], &[]).expect("valid section");
        assert_eq!(types.offset("task", "a"), Some(0));
        assert_eq!(types.offset("task", "b"), Some(12));
        assert_eq!(types.offset("task", "c"), None);
    }

    /// A struct that holds itself many times over, without a name, is not searched for years.
    #[test]
    fn searches_a_bounded_number_of_members() {
        const MEMBERS: u32 = 300;
        let mut types = vec![1, info(KIND_STRUCT, MEMBERS), 8];
        types.extend([0, 1, 0].repeat(MEMBERS as usize));
        let types = KernelTypes::parse(&section(&types, "\0x\0"), &["x"], &[]).expect("valid section");
        assert_eq!(types.offset("x", "absent"), None);
    }

    /// Truncation anywhere is refused, never a panic.
    #[test]
    fn refuses_truncated_sections() {
        let whole = section(&[1, info(KIND_STRUCT, 1), 8, 1, 0, 0], "\0x\0");
        for len in 0..whole.len() {
            assert!(KernelTypes::parse(&whole[..len], &["x"], &[]).is_none(), "{len} bytes were accepted");
        }
    }
}
