//! `numeric` and `money`: decimal text to an unscaled big-endian two's complement integer of any length.

use crate::avro::error::TextError;

/// A decimal number taken apart. `integral` and `fraction` are digits only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::avro) struct Decimal<'a> {
    pub negative: bool,
    pub integral: &'a [u8],
    pub fraction: &'a [u8],
}

/// Reads PostgreSQL's plain decimal text.
pub(in crate::avro) fn parse(text: &[u8]) -> Result<Decimal<'_>, TextError> {
    let (negative, unsigned) = match text {
        [b'-', rest @ ..] => (true, rest),
        rest => (false, rest),
    };
    let point = unsigned.iter().position(|&b| b == b'.');
    let (integral, fraction) = match point {
        Some(at) => (&unsigned[..at], &unsigned[at + 1..]),
        None => (unsigned, &unsigned[..0]),
    };
    let digits_only = integral.iter().chain(fraction).all(u8::is_ascii_digit);
    if !digits_only || integral.is_empty() && fraction.is_empty() {
        return Err(match unsigned {
            b"NaN" | b"Infinity" => TextError::NoPlace {
                reason: "an exact decimal cannot be NaN or infinite",
                hint: "set decimal.handling.mode to string or double, or exclude the column (column.exclude.list)",
            },
            _ => TextError::Malformed("not a decimal number"),
        });
    }
    Ok(Decimal { negative, integral, fraction })
}

impl<'a> Decimal<'a> {
    /// Fraction without zeros at its end.
    pub fn stripped(self) -> Self {
        let zeros = self.fraction.iter().rev().take_while(|&&b| b == b'0').count();
        Decimal { fraction: &self.fraction[..self.fraction.len() - zeros], ..self }
    }

    /// Appends the unscaled value at `scale`, minimal in length. `scale` at least covers the fraction, or only
    /// zeros are cut.
    pub fn put_unscaled(self, scale: usize, out: &mut Vec<u8>) -> Result<(), TextError> {
        let (fraction, cut) = self.fraction.split_at(self.fraction.len().min(scale));
        if cut.iter().any(|&b| b != b'0') {
            return Err(TextError::Malformed("more digits after the point than the column's scale"));
        }
        let zeros = scale - fraction.len();
        let leading = self.integral.iter().take_while(|&&b| b == b'0').count();
        let integral = &self.integral[leading..];
        if integral.len() + scale <= 38 {
            let mut value: i128 = 0;
            for digit in integral.iter().chain(fraction) {
                value = value * 10 + i128::from(digit - b'0');
            }
            for _ in 0..zeros {
                value *= 10;
            }
            put_i128(if self.negative { -value } else { value }, out);
        } else {
            self.put_large(integral, fraction, zeros, out);
        }
        Ok(())
    }

    /// Beyond 38 digits: schoolbook multiplication in limbs of 32 bits.
    fn put_large(self, integral: &[u8], fraction: &[u8], zeros: usize, out: &mut Vec<u8>) {
        let digits = integral.len() + fraction.len() + zeros;
        let mut limbs: Vec<u32> = Vec::with_capacity(digits / 9 + 1);
        let mut multiply_add = |factor: u32, addend: u32| {
            let mut carry = u64::from(addend);
            for limb in &mut limbs {
                carry += u64::from(*limb) * u64::from(factor);
                *limb = carry as u32;
                carry >>= 32;
            }
            if carry != 0 {
                limbs.push(carry as u32);
            }
        };
        let (mut chunk, mut weight) = (0u32, 1u32);
        for digit in integral.iter().chain(fraction).copied().chain(std::iter::repeat_n(b'0', zeros)) {
            chunk = chunk * 10 + u32::from(digit - b'0');
            weight *= 10;
            if weight == 1_000_000_000 {
                multiply_add(weight, chunk);
                (chunk, weight) = (0, 1);
            }
        }
        if weight > 1 {
            multiply_add(weight, chunk);
        }
        let start = out.len();
        out.push(0);
        out.extend(limbs.iter().rev().flat_map(|limb| limb.to_be_bytes()));
        let magnitude = &mut out[start..];
        if self.negative {
            // Two's complement: all bits turned, plus one.
            let mut carry = true;
            for byte in magnitude.iter_mut().rev() {
                let (turned, overflow) = (!*byte).overflowing_add(u8::from(carry));
                *byte = turned;
                carry = overflow;
            }
        }
        let spare = redundant_sign_bytes(&out[start..]);
        out.drain(start..start + spare);
    }
}

/// Bytes in front that only repeat the sign.
fn redundant_sign_bytes(bytes: &[u8]) -> usize {
    bytes
        .windows(2)
        .take_while(|pair| pair[0] == 0 && pair[1] & 0x80 == 0 || pair[0] == 0xff && pair[1] & 0x80 != 0)
        .count()
}

/// Appends the shortest big-endian two's complement of `value`.
pub(in crate::avro) fn put_i128(value: i128, out: &mut Vec<u8>) {
    let bytes = value.to_be_bytes();
    out.extend_from_slice(&bytes[redundant_sign_bytes(&bytes)..]);
}

/// `money` as cents of `digits` fraction digits: `-$92,233,720,368,547,758.08`. The symbol and the marks between
/// thousands vary with `lc_monetary`; the last `.` or `,` with digits on both sides that is followed by other than
/// three digits, or preceded by another mark, is the point.
pub(in crate::avro) fn money(text: &[u8], fraction_digits: u32) -> Result<i128, TextError> {
    let negative = text.contains(&b'-') || text.first() == Some(&b'(');
    let last_mark = text.iter().rposition(|b| matches!(b, b'.' | b','));
    let decimals_after = |at: usize| text[at + 1..].iter().filter(|b| b.is_ascii_digit()).count();
    let point = last_mark.filter(|&at| {
        let thousands =
            decimals_after(at) == 3 && !text[..at].iter().any(|b| *b != text[at] && matches!(b, b'.' | b','));
        !thousands
    });
    let mut value: i128 = 0;
    let mut digits = 0;
    let mut scale = 0;
    for (at, byte) in text.iter().enumerate().filter(|(_, byte)| byte.is_ascii_digit()) {
        digits += 1;
        if digits > 30 {
            return Err(TextError::Malformed("too many digits for money"));
        }
        value = value * 10 + i128::from(byte - b'0');
        scale += u32::from(point.is_some_and(|point| at > point));
    }
    if digits == 0 {
        return Err(TextError::Malformed("no digits"));
    }
    // Brought to the wanted scale, halves away from zero.
    if scale <= fraction_digits {
        value = 10i128
            .checked_pow(fraction_digits - scale)
            .and_then(|factor| value.checked_mul(factor))
            .ok_or(TextError::Malformed("money.fraction.digits is too large"))?;
    } else {
        let divisor = 10i128.pow(scale - fraction_digits);
        value = (value + divisor / 2) / divisor;
    }
    Ok(if negative { -value } else { value })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unscaled(text: &str, scale: usize) -> Result<Vec<u8>, TextError> {
        let mut out = vec![0xaa];
        parse(text.as_bytes())?.put_unscaled(scale, &mut out)?;
        Ok(out.split_off(1))
    }

    #[test]
    fn unscaled_values_are_minimal_twos_complement() {
        for (text, scale, hex) in [
            ("0", 0, vec![0]),
            ("0.00", 2, vec![0]),
            ("1.27", 2, vec![127]),
            ("1.28", 2, vec![0, 128]),
            ("-1.28", 2, vec![128]),
            ("-1.29", 2, vec![0xff, 0x7f]),
            ("-0.000000000000000001", 18, vec![0xff]),
            ("1.5", 3, vec![5, 0xdc]),
        ] {
            assert_eq!(unscaled(text, scale).unwrap(), hex, "{text}");
        }
        assert!(unscaled("1.25", 1).is_err());
        assert_eq!(unscaled("1.20", 1).unwrap(), [12]);
    }

    #[test]
    fn large_and_small_numbers_are_the_same_arithmetic() {
        // 2^160 and its negative, and around.
        let two_160 = "1461501637330902918203684832716283019655932542976";
        let mut expected = vec![1];
        expected.extend([0; 20]);
        assert_eq!(unscaled(two_160, 0).unwrap(), expected);
        let mut negative = vec![0xff];
        negative.extend([0; 20]);
        assert_eq!(unscaled(&format!("-{two_160}"), 0).unwrap(), negative);
        // The same number through both ways: padding it with fraction zeros makes it large.
        for text in ["1", "-1", "127", "-128", "128", "99999999999999999999", "-255"] {
            let (mut small, mut large) = (Vec::new(), Vec::new());
            let number = parse(text.as_bytes()).unwrap();
            number.put_unscaled(0, &mut small).unwrap();
            number.put_large(number.integral, b"", 0, &mut large);
            assert_eq!(small, large, "{text}");
        }
    }

    #[test]
    fn what_is_not_a_finite_decimal_is_refused() {
        for text in ["", "-", ".", "1e5", "+1", "1.2.3", "abc"] {
            assert!(matches!(parse(text.as_bytes()), Err(TextError::Malformed(_))), "{text}");
        }
        for text in ["NaN", "Infinity", "-Infinity"] {
            assert!(matches!(parse(text.as_bytes()), Err(TextError::NoPlace { .. })), "{text}");
        }
    }

    #[test]
    fn money_is_read_in_the_forms_of_several_locales() {
        for (text, cents) in [
            ("$1,234.56", 123_456),
            ("-$92,233,720,368,547,758.08", -9_223_372_036_854_775_808),
            ("$0.01", 1),
            ("-$1.28", -128),
            ("1.234,56 €", 123_456),
            ("($5.00)", -500),
            ("¥1,234", 123_400),
        ] {
            assert_eq!(money(text.as_bytes(), 2), Ok(cents), "{text}");
        }
        assert_eq!(money(b"$1.25", 1), Ok(13));
        assert_eq!(money(b"$1.25", 3), Ok(1250));
        assert!(money(b"$", 2).is_err());
    }
}
