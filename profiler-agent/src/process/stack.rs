//! What holds for the addresses of any stack.

use profiler_common::abi::sample::StackEnd;

use crate::profile::{CodeAddress, Location};

/// Marks the leaf as an instruction pointer and every caller as a return address.
pub(super) fn leaf_first(addresses: &[u64]) -> impl Iterator<Item = CodeAddress> {
    addresses.iter().enumerate().map(move |(depth, &address)| {
        if depth == 0 { CodeAddress::Instruction(address) } else { CodeAddress::Return(address) }
    })
}

/// Cuts what lies beyond the first caller that points at no code, unless the walk found the root: a lost
/// frame pointer leads to words that only look like return addresses.
pub(super) fn trim(user: &mut Vec<Location>, end: StackEnd) -> StackEnd {
    let Some(outermost) = user.iter().rposition(|location| !matches!(location, Location::Unmapped(_))) else {
        user.truncate(1);
        return if user.is_empty() || end.is_whole() { end } else { StackEnd::NotCode };
    };
    if outermost + 1 == user.len() || end.is_whole() {
        return end;
    }
    user.truncate(outermost + 1);
    StackEnd::NotCode
}
