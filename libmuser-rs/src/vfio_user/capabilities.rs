// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the two sides tell each other they can do: the JSON of a `VERSION` message.
//!
//! ```json
//! { "capabilities": { "max_msg_fds": 16, "max_data_xfer_size": 1048576, "write_multiple": true } }
//! ```
//!
//! Whatever is not there has a default; what nobody knows here is no matter.

use serde_json::{Map, Value};

use super::wire::{DEFAULT_DATA, DEFAULT_DMA_MAPS, DEFAULT_FDS, DEFAULT_PAGE_SIZES};
use crate::error::{Errno, Error, Result};

/// What one side has said it can do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capabilities {
    /// Descriptors which it takes in one message; see [`fds`](Self::fds).
    pub max_msg_fds: Option<u64>,
    /// Bytes of data which it takes in one message; see [`data`](Self::data).
    pub max_data_xfer_size: Option<u64>,
    /// Mappings for DMA at one time; see [`dma_maps`](Self::dma_maps).
    pub max_dma_maps: Option<u64>,
    /// Page sizes of mappings, or'ed; see [`page_sizes`](Self::page_sizes).
    pub pgsizes: Option<u64>,
    /// What it can of migration.
    pub migration: Option<Migration>,
    /// A second socket for what the server asks for.
    pub twin_socket: Option<TwinSocket>,
    /// Whether `REGION_WRITE_MULTI` works.
    pub write_multiple: Option<bool>,
}

/// What one side can of migration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Migration {
    /// Page size of the bitmap of dirty pages.
    pub pgsize: Option<u64>,
    /// Bytes of the bitmap.
    pub max_bitmap_size: Option<u64>,
}

/// A second socket, for what the server asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TwinSocket {
    /// Whether the sender can have one; in a reply, whether there is one.
    pub supported: bool,
    /// In a reply, which descriptor of the message it is.
    pub fd_index: Option<u64>,
}

impl Capabilities {
    /// Parses the data of a `VERSION` message, without its NUL.
    ///
    /// # Errors
    ///
    /// `EINVAL`: it is not JSON, or something in it is of another kind than it has to be. What that
    /// is, is said in the error.
    pub fn parse(data: &[u8]) -> Result<Self> {
        if data.is_empty() {
            return Ok(Self::default());
        }
        let value: Value = serde_json::from_slice(data)
            .map_err(|error| refused(format!("the version data is not JSON: {error}")))?;
        let Value::Object(version) = value else {
            return Err(refused("the version data is no JSON object"));
        };
        let Some(capabilities) = object(&version, "capabilities")? else {
            return Ok(Self::default());
        };
        let parsed = Self {
            max_msg_fds: number(capabilities, "max_msg_fds")?,
            max_data_xfer_size: number(capabilities, "max_data_xfer_size")?,
            max_dma_maps: number(capabilities, "max_dma_maps")?,
            pgsizes: number(capabilities, "pgsizes")?,
            migration: match object(capabilities, "migration")? {
                Some(migration) => Some(Migration {
                    pgsize: number(migration, "pgsize")?,
                    max_bitmap_size: number(migration, "max_bitmap_size")?,
                }),
                None => None,
            },
            twin_socket: match object(capabilities, "twin_socket")? {
                Some(twin) => Some(TwinSocket {
                    supported: truth(twin, "supported")?.unwrap_or(false),
                    fd_index: number(twin, "fd_index")?,
                }),
                None => None,
            },
            write_multiple: truth(capabilities, "write_multiple")?,
        };
        if parsed.max_data_xfer_size == Some(0) {
            return Err(refused("max_data_xfer_size is 0: no data could be sent"));
        }
        if parsed.page_sizes() & DEFAULT_PAGE_SIZES == 0 {
            return Err(refused("pgsizes is without pages of 4096 bytes"));
        }
        Ok(parsed)
    }

    /// The data of a `VERSION` message, with the NUL at its end.
    #[must_use]
    pub fn to_data(&self) -> Vec<u8> {
        let mut capabilities = Map::new();
        let mut put = |name: &str, value: Option<Value>| {
            if let Some(value) = value {
                capabilities.insert(name.into(), value);
            }
        };
        put("max_msg_fds", self.max_msg_fds.map(Value::from));
        put(
            "max_data_xfer_size",
            self.max_data_xfer_size.map(Value::from),
        );
        put("max_dma_maps", self.max_dma_maps.map(Value::from));
        put("pgsizes", self.pgsizes.map(Value::from));
        put("migration", self.migration.map(Migration::to_value));
        put("twin_socket", self.twin_socket.map(TwinSocket::to_value));
        put("write_multiple", self.write_multiple.map(Value::from));
        let mut version = Map::new();
        version.insert("capabilities".into(), capabilities.into());
        let mut data = Value::from(version).to_string().into_bytes();
        data.push(0);
        data
    }

    /// Descriptors which the sender takes in one message.
    #[must_use]
    pub fn fds(&self) -> usize {
        to_usize(self.max_msg_fds, DEFAULT_FDS)
    }

    /// Bytes of data which the sender takes in one message.
    #[must_use]
    pub fn data(&self) -> usize {
        to_usize(self.max_data_xfer_size, DEFAULT_DATA)
    }

    /// Mappings for DMA at one time.
    #[must_use]
    pub fn dma_maps(&self) -> u64 {
        self.max_dma_maps.unwrap_or(DEFAULT_DMA_MAPS)
    }

    /// Page sizes of mappings, or'ed.
    #[must_use]
    pub fn page_sizes(&self) -> u64 {
        self.pgsizes.unwrap_or(DEFAULT_PAGE_SIZES)
    }

    /// Whether the sender can have, or has, a second socket.
    #[must_use]
    pub fn has_twin_socket(&self) -> bool {
        self.twin_socket.is_some_and(|twin| twin.supported)
    }

    /// Whether `REGION_WRITE_MULTI` works.
    #[must_use]
    pub fn writes_multiple(&self) -> bool {
        self.write_multiple.unwrap_or(false)
    }
}

impl Migration {
    fn to_value(self) -> Value {
        let mut map = Map::new();
        for (name, number) in [
            ("pgsize", self.pgsize),
            ("max_bitmap_size", self.max_bitmap_size),
        ] {
            if let Some(number) = number {
                map.insert(name.into(), number.into());
            }
        }
        map.into()
    }
}

impl TwinSocket {
    fn to_value(self) -> Value {
        let mut map = Map::new();
        map.insert("supported".into(), self.supported.into());
        if let Some(index) = self.fd_index {
            map.insert("fd_index".into(), index.into());
        }
        map.into()
    }
}

fn to_usize(number: Option<u64>, default: usize) -> usize {
    number.map_or(default, |number| {
        usize::try_from(number).unwrap_or(usize::MAX)
    })
}

fn refused(message: impl Into<String>) -> Error {
    Error::new(Errno::EINVAL, message)
}

fn wanted(name: &str, kind: &str) -> Error {
    refused(format!("{name} of the version data is not {kind}"))
}

fn object<'a>(map: &'a Map<String, Value>, name: &str) -> Result<Option<&'a Map<String, Value>>> {
    let found = map.get(name).map(Value::as_object);
    found
        .map(|v| v.ok_or_else(|| wanted(name, "an object")))
        .transpose()
}

fn number(map: &Map<String, Value>, name: &str) -> Result<Option<u64>> {
    let found = map.get(name).map(Value::as_u64);
    found
        .map(|v| v.ok_or_else(|| wanted(name, "a number from 0 to 2^64 - 1")))
        .transpose()
}

fn truth(map: &Map<String, Value>, name: &str) -> Result<Option<bool>> {
    let found = map.get(name).map(Value::as_bool);
    found
        .map(|v| v.ok_or_else(|| wanted(name, "true or false")))
        .transpose()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn nothing_said_means_the_defaults() {
        for data in ["", "{}", r#"{"capabilities":{}}"#] {
            let capabilities = Capabilities::parse(data.as_bytes()).unwrap();
            assert_eq!(capabilities.fds(), 1);
            assert_eq!(capabilities.data(), 1 << 20);
            assert_eq!(capabilities.dma_maps(), 65_535);
            assert_eq!(capabilities.page_sizes(), 4096);
            assert!(!capabilities.has_twin_socket() && !capabilities.writes_multiple());
        }
    }

    #[test]
    fn what_nobody_knows_is_no_matter() {
        let data = r#"{"odd":[1],"capabilities":{"max_msg_fds":8,"later":{"a":null}}}"#;

        assert_eq!(Capabilities::parse(data.as_bytes()).unwrap().fds(), 8);
    }

    #[test]
    fn what_is_of_another_kind_is_refused_by_name() {
        for (data, name) in [
            (r#"["capabilities"]"#, "object"),
            (r#"{"capabilities":7}"#, "capabilities"),
            (r#"{"capabilities":{"max_msg_fds":-1}}"#, "max_msg_fds"),
            (r#"{"capabilities":{"max_msg_fds":"8"}}"#, "max_msg_fds"),
            (r#"{"capabilities":{"max_data_xfer_size":1.5}}"#, "max_data"),
            (r#"{"capabilities":{"max_data_xfer_size":0}}"#, "max_data"),
            (r#"{"capabilities":{"pgsizes":8192}}"#, "pgsizes"),
            (r#"{"capabilities":{"write_multiple":1}}"#, "write_multiple"),
            (r#"{"capabilities":{"twin_socket":true}}"#, "twin_socket"),
            ("{", "JSON"),
            ("\u{0}", "JSON"),
        ] {
            let error = Capabilities::parse(data.as_bytes()).unwrap_err();
            assert_eq!(error.errno(), Errno::EINVAL);
            assert!(error.to_string().contains(name), "{data}: {error}");
        }
    }

    #[test]
    fn deep_nesting_is_refused() {
        let data = "[".repeat(100_000);

        assert!(Capabilities::parse(data.as_bytes()).is_err());
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(
            fds in proptest::option::of(any::<u64>()),
            data in proptest::option::of(1_u64..),
            twin in proptest::option::of((any::<bool>(), proptest::option::of(any::<u64>()))),
            pgsize in proptest::option::of(proptest::option::of(any::<u64>())),
            multiple in proptest::option::of(any::<bool>()),
        ) {
            let capabilities = Capabilities {
                max_msg_fds: fds,
                max_data_xfer_size: data,
                max_dma_maps: fds,
                pgsizes: data.map(|data| data | 4096),
                migration: pgsize.map(|pgsize| Migration { pgsize, max_bitmap_size: fds }),
                twin_socket: twin.map(|(supported, fd_index)| TwinSocket { supported, fd_index }),
                write_multiple: multiple,
            };
            let mut data = capabilities.to_data();
            prop_assert_eq!(data.pop(), Some(0));
            prop_assert_eq!(Capabilities::parse(&data).unwrap(), capabilities);
        }

        #[test]
        fn any_bytes_are_parsed_or_refused(data in prop::collection::vec(any::<u8>(), 0..60)) {
            let _ = Capabilities::parse(&data);
        }
    }
}
