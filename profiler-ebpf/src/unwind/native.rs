//! Native frames: C, C++, Rust, Go and everything else that runs on the machine's own stack.
//!
//! In: the frame's registers and what the agent published about code. Out: its caller's registers.

use core::ptr::{read_volatile, write_volatile};

use profiler_common::{
    abi::{
        sample::{LARGE_FRAMES, StackEnd},
        tables::{CHUNK_ROWS, ExecutableTable, MAPPING_SEARCH_STEPS, MappingRecord, PAGE_SHIFT, Page, Row, TableState},
    },
    unwind::{
        Registers, follows_a_call, is_signal_trampoline,
        rule::{Rule, cfa},
        step,
    },
};

use super::Scratch;
use crate::{
    lifecycle,
    maps::{CHUNKS, EXECUTABLES, MAPPINGS, PAGES, RULES},
    memory::{UserMemory, code_pair, opaque},
};

/// The mapping that the last frame was in, and its table: the next frame is likely in the same.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Place {
    mapping: MappingRecord,
    table: ExecutableTable,
}

/// Forgets the last place: it belonged to another process.
#[inline(always)]
pub fn start(place: &mut Place) {
    place.mapping.end = 0;
}

/// Finds the caller of a native frame.
#[inline(always)]
pub fn caller(scratch: &mut Scratch) -> Result<Registers, StackEnd> {
    // A return address may be the first one past its function: the call is one byte earlier at least.
    let address = scratch.registers.pc - u64::from(scratch.is_return);
    let place = &mut scratch.place;
    if address < place.mapping.start || address >= place.mapping.end {
        if scratch.mappings.count == 0 {
            return Err(StackEnd::UnknownProcess);
        }
        find_mapping(scratch, address)?;
    }
    let rule = find_rule(scratch, address)?;
    if rule.cfa & cfa::GUESSED != 0 {
        return match step(rule, &scratch.registers, None, &mut UserMemory(&mut scratch.window)) {
            Ok(caller) if is_likely(&caller) => {
                scratch.is_return = 1;
                Ok(caller)
            }
            Err(StackEnd::Root) => Err(StackEnd::Root),
            _ => uncovered_caller(scratch),
        };
    }
    if rule.cfa == cfa::FRAME_POINTER_CHAIN {
        return uncovered_caller(scratch);
    }
    let leaf = if scratch.is_leaf == 1 { Some(&scratch.user_registers) } else { None };
    let caller = step(rule, &scratch.registers, leaf, &mut UserMemory(&mut scratch.window))?;
    scratch.is_return = u8::from(rule.cfa != cfa::LEAF_JUMP);
    if rule.cfa == cfa::SIGNAL_FRAME {
        leave_signal_handler(scratch);
    }
    Ok(caller)
}

/// Neither what a signal interrupted nor the trampoline that its handler returns to is at a return address. Readers
/// take every frame but the leaf for one, and look it up one byte earlier: so these are recorded one byte later.
#[inline(always)]
fn leave_signal_handler(scratch: &mut Scratch) {
    scratch.is_return = 0;
    let trampoline = opaque(scratch.frames).wrapping_sub(1);
    if scratch.is_leaf == 0 && trampoline < LARGE_FRAMES as u64 {
        scratch.sample.frames[trampoline as usize & (LARGE_FRAMES - 1)] = scratch.registers.pc + 1;
    }
}

/// Finds the caller of a frame that no table covers, by its frame pointer. The caller found has to look like
/// one, so that frames are never invented.
#[inline(always)]
fn uncovered_caller(scratch: &mut Scratch) -> Result<Registers, StackEnd> {
    const CHAIN: Rule = Rule::plain(cfa::FRAME_POINTER_CHAIN);
    if let Some([code, _]) = code_pair(scratch.registers.pc)
        && is_signal_trampoline(code)
    {
        leave_signal_handler(scratch);
        return step(&Rule::plain(cfa::SIGNAL_FRAME), &scratch.registers, None, &mut UserMemory(&mut scratch.window));
    }
    let caller = step(&CHAIN, &scratch.registers, None, &mut UserMemory(&mut scratch.window))?;
    if !is_likely(&caller) {
        return Err(StackEnd::FramePointerLost);
    }
    scratch.is_return = 1;
    Ok(caller)
}

/// Whether a caller that was guessed is one: its code has just made a call, or it is what signal handlers return
/// to.
#[inline(always)]
fn is_likely(caller: &Registers) -> bool {
    match code_pair(caller.pc.wrapping_sub(8)) {
        Some([before, after]) => follows_a_call(before) || is_signal_trampoline(after),
        None => false,
    }
}

/// Makes the mapping at `address` the current place.
#[inline(always)]
fn find_mapping(scratch: &mut Scratch, address: u64) -> Result<(), StackEnd> {
    let end = scratch.mappings.first + scratch.mappings.count;
    let mut search = Search::start(&mut scratch.search, scratch.mappings.first, end);
    for _ in 0..=MAPPING_SEARCH_STEPS {
        let (low, high) = search.bounds();
        if low >= high {
            break;
        }
        let middle = low + (high - low) / 2;
        let Some(mapping) = MAPPINGS.get(middle) else { return Err(StackEnd::NotCode) };
        if mapping.end <= address {
            search.set_low(middle + 1);
        } else {
            search.set_high(middle);
        }
    }
    let (low, _) = search.bounds();
    let is_found = low < end;
    match MAPPINGS.get(low) {
        Some(mapping) if is_found && mapping.start <= address && address < mapping.end => {
            scratch.place.mapping = *mapping;
        }
        _ => {
            scratch.place.mapping.end = 0;
            lifecycle::announce(&scratch.sample.header.process, address);
            return Err(StackEnd::NotCode);
        }
    }
    let Some(table) = EXECUTABLES.get_ptr_mut(scratch.place.mapping.executable) else {
        return Err(StackEnd::NotCode);
    };
    // SAFETY: an array's slots are always there; the agent changes a table's fields only while its state is
    // not ready.
    let table = unsafe { &mut *table };
    if table.used == 0 {
        table.used = 1;
    }
    scratch.place.table = *table;
    if table.state == TableState::Absent as u32 {
        table.state = TableState::Requested as u32;
        if !lifecycle::want_table(&scratch.sample.header.process, scratch.place.mapping.executable) {
            table.state = TableState::Absent as u32;
        }
    }
    if table.state == TableState::Requested as u32 {
        table.missed += 1;
    }
    Ok(())
}

/// Finds the rule for `address`, which lies in the current place.
#[inline(always)]
fn find_rule(scratch: &mut Scratch, address: u64) -> Result<&'static Rule, StackEnd> {
    const READY: u32 = TableState::Ready as u32;
    const NONE: u32 = TableState::None as u32;
    const OVER_BUDGET: u32 = TableState::OverBudget as u32;
    let table = &scratch.place.table;
    match table.state {
        READY => {}
        NONE => return rule(0),
        OVER_BUDGET => return Err(StackEnd::OverBudget),
        _ => return Err(StackEnd::TablePending),
    }
    let stated = address.wrapping_sub(scratch.place.mapping.bias);
    let number = (stated >> PAGE_SHIFT).wrapping_sub(u64::from(table.base));
    if number >= u64::from(table.pages) {
        return rule(0);
    }
    let Some(page) = PAGES.get(table.first_page + number as u32) else { return rule(0) };
    if page.rows == 0 {
        return rule(0);
    }
    let chunk = CHUNKS.get(u32::from(page.chunk)).and_then(|chunk| chunk.get_ptr_mut::<u32, [Row; CHUNK_ROWS]>(&0));
    let Some(chunk) = chunk else { return Err(StackEnd::TablePending) };
    // SAFETY: an array's value is always there; the agent only changes rows that no page leads to.
    let chunk = unsafe { chunk.as_ref() };
    rule(last_row_up_to(chunk, page, stated & 0xffff).rule())
}

/// The last row of a page that begins at or before `place`. The first one begins at zero.
///
/// Which way a step goes is as good as random, so the steps have no branches that could be predicted wrongly.
#[inline(always)]
fn last_row_up_to(chunk: &[Row; CHUNK_ROWS], page: &Page, place: u64) -> Row {
    const MASK: u64 = CHUNK_ROWS as u64 - 1;
    let (first, rows) = (u64::from(page.first), u64::from(page.rows));
    let row_at = |index: u64| chunk[((first + index) & MASK) as usize];
    let mut found = 0;
    let mut half = u64::from(page.first_half);
    for _ in 0..CHUNK_ROWS.ilog2() {
        if half == 0 {
            break;
        }
        let candidate = found + half;
        let begins = u64::from(row_at(candidate).place());
        // All ones where the candidate is in the page and begins early enough. The compiler must not see that
        // these are comparisons: it would make them branches.
        let is_before = (opaque(begins.wrapping_sub(place + 1)) as i64 >> 63) as u64;
        let is_inside = (opaque(candidate.wrapping_sub(rows)) as i64 >> 63) as u64;
        found += half & is_before & is_inside;
        half /= 2;
    }
    row_at(found)
}

/// The bounds of a binary search.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Bounds {
    low: u32,
    high: u32,
}

/// A binary search whose bounds live in the scratch space and not in registers: the verifier takes what it reads
/// from there for any number, so the two ways that a step can go are the same to it afterwards.
struct Search<'a>(&'a mut Bounds);

impl<'a> Search<'a> {
    #[inline(always)]
    fn start(bounds: &'a mut Bounds, low: u32, high: u32) -> Self {
        let mut search = Self(bounds);
        search.set_low(low);
        search.set_high(high);
        search
    }

    #[inline(always)]
    fn bounds(&self) -> (u32, u32) {
        // SAFETY: both are fields of a live reference.
        unsafe { (read_volatile(&raw const self.0.low), read_volatile(&raw const self.0.high)) }
    }

    #[inline(always)]
    fn set_low(&mut self, low: u32) {
        // SAFETY: as above.
        unsafe { write_volatile(&raw mut self.0.low, low) };
    }

    #[inline(always)]
    fn set_high(&mut self, high: u32) {
        // SAFETY: as above.
        unsafe { write_volatile(&raw mut self.0.high, high) };
    }
}

#[inline(always)]
fn rule(number: u16) -> Result<&'static Rule, StackEnd> {
    RULES.get(u32::from(number)).ok_or(StackEnd::UnsupportedRule)
}
