//! What the fuzz targets of the kernel's own records call.

use super::{btf::KernelTypes, side_band};

/// Type information: members lie where the section says, however structs nest.
pub fn btf(bytes: &[u8]) {
    let Some(types) = KernelTypes::parse(bytes, &["task_struct", "a"], &["bpf_loop"]) else { return };
    for structure in ["task_struct", "a"] {
        for member in ["stack", "b"] {
            let _ = types.offset(structure, member);
        }
    }
    let _ = types.has_function("bpf_loop");
}

/// Records of new mappings and symbols: what was decoded is what the bytes say.
pub fn mmap_record(bytes: &[u8]) {
    if let Some(code) = side_band::parse_symbol(bytes) {
        assert!(code.start <= code.end);
    }
    let Some(mapping) = side_band::parse(bytes) else { return };
    assert!(mapping.start <= mapping.end);
    let mut encoded = Vec::new();
    for half in [mapping.tgid, 0] {
        encoded.extend(half.to_ne_bytes());
    }
    for word in [mapping.start, mapping.end - mapping.start, mapping.file_offset] {
        encoded.extend(word.to_ne_bytes());
    }
    for half in [mapping.device >> 20, mapping.device & 0xf_ffff] {
        encoded.extend(half.to_ne_bytes());
    }
    encoded.extend(mapping.inode.to_ne_bytes());
    assert_eq!(side_band::parse(&encoded), Some(mapping));
}
