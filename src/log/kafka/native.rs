//! librdkafka's producer, called without the rdkafka crate in between where that costs more than librdkafka does.
//!
//! A topic is found by its handle, not by its name under a lock for every record, and header objects come back with the
//! acknowledgements and are used again instead of being copied (six allocations a record, freed on another thread). A
//! bare program that hands over a million records of 200 bytes with Debezium's four headers, 300,000 a second, takes
//! 2.3 to 2.7 CPU seconds without this and 1.4 to 1.9 with it; telling librdkafka when to send ([`Native::flush`]), so
//! that a batch is one request, takes it to 1.0 to 1.2.
//!
//! The library's unsafe code is here alone, and stands on this: the client lives in [`Native`], everything that points into it holds
//! an `Arc` of that; librdkafka's handles may be used by any thread; a message's key and value are copied before
//! `produce` returns; a header object belongs to librdkafka from a `produce` that went well until it is detached from
//! the acknowledged message, and to a [`Headers`] at all other times.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString};
use std::os::raw::{c_char, c_int, c_void};
use std::ptr;
use std::sync::Arc;
use std::time::Duration;

use rdkafka::ClientContext as _;
use rdkafka::bindings as sys;
use rdkafka::bindings::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_NO_ERROR as NO_ERROR;
use rdkafka::bindings::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_UNKNOWN as UNKNOWN;
use rdkafka::bindings::rd_kafka_vtype_t as vtype;
use rdkafka::config::{ClientConfig, FromClientConfigAndContext as _, RDKafkaLogLevel};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::producer::{BaseProducer, Producer as _, ProducerContext, PurgeConfig};

use super::client::Told;

/// A producer that nobody polls but [`Native::poll`].
pub(super) struct Native {
    producer: BaseProducer<Told>,
    /// Where acknowledgements, errors and log lines come.
    queue: *mut sys::rd_kafka_queue_t,
}

// SAFETY: librdkafka's client and queues may be used by any thread at any time.
unsafe impl Send for Native {}
// SAFETY: as above.
unsafe impl Sync for Native {}

impl ProducerContext for Told {
    type DeliveryOpaque = usize;

    /// Only while the producer is being dropped: nobody asks any more.
    fn delivery(&self, _: &rdkafka::message::DeliveryResult<'_>, _: usize) {}
}

/// A message of a producer, settled by the brokers.
pub(super) struct Settled {
    /// As it was given to [`Native::produce`].
    pub tag: usize,
    pub result: Result<(), Undelivered>,
    pub headers: Option<Headers>,
}

/// Why a message did not arrive.
pub(super) struct Undelivered {
    pub error: KafkaError,
    /// Where it was to go.
    pub topic: Option<String>,
}

impl Native {
    pub fn new(config: &ClientConfig, told: Told) -> KafkaResult<Arc<Self>> {
        let producer = BaseProducer::from_config_and_context(config, told)?;
        // SAFETY: the client is alive; the handle is given back before it ends (`drop`).
        let queue = unsafe { sys::rd_kafka_queue_get_main(producer.client().native_ptr()) };
        Ok(Arc::new(Native { producer, queue }))
    }

    /// A handle of the topic. Errors: a name that no topic can have.
    pub fn topic(self: &Arc<Self>, name: &str) -> Option<Topic> {
        let c_name = CString::new(name).ok()?;
        // SAFETY: the client is alive, the name ends with a zero, and no configuration means the client's.
        let handle =
            unsafe { sys::rd_kafka_topic_new(self.producer.client().native_ptr(), c_name.as_ptr(), ptr::null_mut()) };
        (!handle.is_null()).then(|| Topic { handle, _of: self.clone() })
    }

    /// Hands a message over, which is copied. `timestamp_ms`: since 1970. On an error the headers come back.
    pub fn produce(
        &self,
        topic: &Topic,
        key: Option<&[u8]>,
        value: Option<&[u8]>,
        headers: Option<Headers>,
        timestamp_ms: i64,
        tag: usize,
    ) -> Result<(), (KafkaError, Option<Headers>)> {
        let bytes = |part: Option<&[u8]>| part.map_or((ptr::null_mut(), 0), |p| (p.as_ptr() as *mut c_void, p.len()));
        let (value, value_size) = bytes(value);
        let (key, key_size) = bytes(key);
        // SAFETY: each tag is followed by what librdkafka reads for it, of that size; key and value are alive and
        // copied (F_COPY) before this returns; the topic is of this client (its `Arc`).
        let error = unsafe {
            sys::rd_kafka_producev(
                self.producer.client().native_ptr(),
                vtype::RD_KAFKA_VTYPE_RKT,
                topic.handle,
                vtype::RD_KAFKA_VTYPE_MSGFLAGS,
                sys::RD_KAFKA_MSG_F_COPY as c_int,
                vtype::RD_KAFKA_VTYPE_VALUE,
                value,
                value_size,
                vtype::RD_KAFKA_VTYPE_KEY,
                key,
                key_size,
                vtype::RD_KAFKA_VTYPE_OPAQUE,
                tag as *mut c_void,
                vtype::RD_KAFKA_VTYPE_TIMESTAMP,
                timestamp_ms,
                vtype::RD_KAFKA_VTYPE_HEADERS,
                headers.as_ref().map_or(ptr::null_mut(), |headers| headers.0),
                vtype::RD_KAFKA_VTYPE_END,
            )
        };
        if error == NO_ERROR {
            // librdkafka's from here on.
            std::mem::forget(headers);
            return Ok(());
        }
        Err((KafkaError::MessageProduction(error.into()), headers))
    }

    /// Waits for news up to `wait` (in whole milliseconds) or until [`Native::wake`], and tells what it was: messages
    /// settled, which are given to `settled` one by one; an error or a log line, which the context is told. False:
    /// there was none.
    pub fn poll(&self, wait: Duration, mut settled: impl FnMut(Settled)) -> bool {
        let wait = c_int::try_from(wait.as_millis()).unwrap_or(c_int::MAX);
        // SAFETY: the queue is alive, an event is destroyed once, and what points into it does not outlive that.
        unsafe {
            let event = sys::rd_kafka_queue_poll(self.queue, wait);
            if event.is_null() {
                return false;
            }
            match sys::rd_kafka_event_type(event) {
                sys::RD_KAFKA_EVENT_DR => loop {
                    let message = sys::rd_kafka_event_message_next(event);
                    if message.is_null() {
                        break;
                    }
                    let mut headers = ptr::null_mut();
                    let detached = sys::rd_kafka_message_detach_headers(message as *mut _, &mut headers) == NO_ERROR;
                    // A broker's code may be one that the enumeration has not got.
                    let code = (&raw const (*message).err).cast::<i32>().read();
                    let result = match sys::rd_kafka_resp_err_t::try_from(code).unwrap_or(UNKNOWN) {
                        NO_ERROR => Ok(()),
                        error => Err(Undelivered {
                            error: KafkaError::MessageProduction(error.into()),
                            topic: Some(text(sys::rd_kafka_topic_name((*message).rkt)).into_owned()),
                        }),
                    };
                    let headers = (detached && !headers.is_null()).then(|| Headers(headers));
                    settled(Settled { tag: (*message)._private as usize, result, headers });
                },
                sys::RD_KAFKA_EVENT_ERROR => {
                    let error = KafkaError::Global(sys::rd_kafka_event_error(event).into());
                    self.producer.context().error(error, text(sys::rd_kafka_event_error_string(event)).trim());
                }
                sys::RD_KAFKA_EVENT_LOG => {
                    let (mut facility, mut line, mut level) = (ptr::null(), ptr::null(), 0);
                    if sys::rd_kafka_event_log(event, &mut facility, &mut line, &mut level) == 0 {
                        // As syslog has them.
                        let level = match level {
                            ..=2 => RDKafkaLogLevel::Critical,
                            3 => RDKafkaLogLevel::Error,
                            4 => RDKafkaLogLevel::Warning,
                            _ => RDKafkaLogLevel::Info,
                        };
                        self.producer.context().log(level, text(facility).trim(), text(line).trim());
                    }
                }
                _ => {}
            }
            sys::rd_kafka_event_destroy(event);
        }
        true
    }

    /// Ends a `poll` that waits, or the next one.
    pub fn wake(&self) {
        // SAFETY: the queue is alive.
        unsafe { sys::rd_kafka_queue_yield(self.queue) };
    }

    /// Lets librdkafka send what it was handed now, whatever `linger.ms` is. Takes a millisecond, in which its threads
    /// look at it, unless all is settled before.
    pub fn flush(&self) {
        // SAFETY: the client is alive.
        unsafe { sys::rd_kafka_flush(self.producer.client().native_ptr(), 1) };
    }

    /// Gives up what is not acknowledged; each message is settled with an error.
    pub fn purge(&self) {
        self.producer.purge(PurgeConfig::default().queue().inflight());
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        // SAFETY: got in `new`, used by nobody else any more, and the client still lives.
        unsafe { sys::rd_kafka_queue_destroy(self.queue) };
    }
}

/// # Safety
/// `text` is null or ends with a zero, and lives as long as what is returned.
unsafe fn text<'a>(text: *const c_char) -> std::borrow::Cow<'a, str> {
    // SAFETY: as the caller says.
    if text.is_null() { "".into() } else { unsafe { CStr::from_ptr(text) }.to_string_lossy() }
}

/// A topic of a producer.
pub(super) struct Topic {
    handle: *mut sys::rd_kafka_topic_t,
    _of: Arc<Native>,
}

// SAFETY: as of `Native`.
unsafe impl Send for Topic {}

impl Drop for Topic {
    fn drop(&mut self) {
        // SAFETY: got in `topic`, and its client still lives.
        unsafe { sys::rd_kafka_topic_destroy(self.handle) };
    }
}

/// Headers of one message.
pub(super) struct Headers(*mut sys::rd_kafka_headers_t);

// SAFETY: nobody else has the object, and librdkafka does not care which thread uses it.
unsafe impl Send for Headers {}

impl Headers {
    pub fn new<'a>(headers: impl Iterator<Item = (&'a str, &'a [u8])>) -> Self {
        // SAFETY: names and values are copied, by their sizes.
        unsafe {
            let object = sys::rd_kafka_headers_new(8);
            for (name, value) in headers {
                let (name_size, value_size) = (name.len() as isize, value.len() as isize);
                sys::rd_kafka_header_add(object, name.as_ptr().cast(), name_size, value.as_ptr().cast(), value_size);
            }
            Headers(object)
        }
    }
}

impl Drop for Headers {
    fn drop(&mut self) {
        // SAFETY: it belongs to this.
        unsafe { sys::rd_kafka_headers_destroy(self.0) };
    }
}
