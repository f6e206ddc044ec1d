// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Features (section 5.21): what a host can set, and what of it does something here.
//!
//! The volatile write cache and the temperature's thresholds do. Arbitration, coalescing and the
//! like are hints, which are kept and read back.

use crate::command::{Answer, Command};
use crate::controller::Config;
use crate::event::Event;
use crate::kept::{Control, Features};
use crate::spec::Status;

// Feature identifiers (figure 271).
const ARBITRATION: u8 = 0x01;
const POWER: u8 = 0x02;
const TEMPERATURE: u8 = 0x04;
const ERROR_RECOVERY: u8 = 0x05;
const WRITE_CACHE: u8 = 0x06;
const QUEUES: u8 = 0x07;
const COALESCING: u8 = 0x08;
const VECTOR: u8 = 0x09;
const ATOMICITY: u8 = 0x0a;
const EVENTS: u8 = 0x0b;

/// Bits of SMART's warnings that can be asked for (figure 291), of which one can come.
const EVENT_BITS: u32 = 0xff;

/// Get Features.
pub(crate) fn get(config: &Config, features: &Features, command: &Command) -> Answer {
    let (select, value) = (command.cdw10.get() >> 8 & 7, command.cdw11.get());
    // Only the current value can be had (ONCS bit 4).
    if select != 0 {
        return Status::INVALID_FIELD.into();
    }
    let dword = match identifier(command) {
        ARBITRATION => features.arbitration,
        POWER => features.power,
        TEMPERATURE => match (value >> 16 & 0xf, value >> 20 & 3) {
            (0, 0) => features.over_temperature,
            (0, 1) => features.under_temperature,
            _ => return Status::INVALID_FIELD.into(),
        },
        ERROR_RECOVERY => features.error_recovery,
        WRITE_CACHE => features.write_cache,
        QUEUES => queues(config),
        COALESCING => features.coalescing,
        VECTOR => match vector(config, value) {
            Some((vector, word, bit)) => {
                let disabled = features.vectors[word] >> bit & 1;
                vector | disabled << 16
            }
            None => return Status::INVALID_FIELD.into(),
        },
        ATOMICITY => features.atomicity,
        EVENTS => features.events,
        _ => return Status::INVALID_FIELD.into(),
    };
    Answer::value(dword)
}

/// Set Features: what it changes, and its answer.
pub(crate) fn set(config: &Config, control: &mut Control, command: &Command) -> Answer {
    let value = command.cdw11.get();
    if command.cdw10.get() >> 31 != 0 {
        return Status::FEATURE_NOT_SAVEABLE.into();
    }
    let features = &mut control.features;
    match identifier(command) {
        ARBITRATION => features.arbitration = value,
        POWER if value & 0x1f == 0 => features.power = value & 0xff,
        TEMPERATURE => {
            let threshold = value & 0xffff;
            match (value >> 16 & 0xf, value >> 20 & 3) {
                (0 | 0xf, 0) => features.over_temperature = threshold,
                (0 | 0xf, 1) => features.under_temperature = threshold,
                _ => return Status::INVALID_FIELD.into(),
            }
            if features.critical_warning() != 0 {
                control.note(Event::Temperature);
            }
        }
        ERROR_RECOVERY => features.error_recovery = value,
        WRITE_CACHE => features.write_cache = value & 1,
        QUEUES => {
            if value & 0xffff == 0xffff || value >> 16 == 0xffff {
                return Status::INVALID_FIELD.into();
            }
            return Answer::value(queues(config));
        }
        COALESCING => features.coalescing = value & 0xffff,
        VECTOR => match vector(config, value) {
            Some((_, word, bit)) => {
                features.vectors[word] &= !(1 << bit);
                features.vectors[word] |= (value >> 16 & 1) << bit;
            }
            None => return Status::INVALID_FIELD.into(),
        },
        ATOMICITY => features.atomicity = value & 1,
        EVENTS => {
            features.events = value & EVENT_BITS;
            if features.critical_warning() != 0 {
                control.note(Event::Temperature);
            }
        }
        _ => return Status::INVALID_FIELD.into(),
    }
    Answer::SUCCESS
}

fn identifier(command: &Command) -> u8 {
    let [identifier, ..] = command.cdw10.get().to_le_bytes();
    identifier
}

/// Number of Queues: all there are, however many are asked for. Both counts are less one.
fn queues(config: &Config) -> u32 {
    let count = u32::from(config.queues) - 1;
    count << 16 | count
}

/// A vector, and where its bit is.
fn vector(config: &Config, value: u32) -> Option<(u32, usize, u32)> {
    let vector = value & 0xffff;
    let word = usize::try_from(vector / 32).ok()?;
    (vector <= u32::from(config.queues)).then_some((vector, word, vector % 32))
}
