//! Holds the interfaces as they are described in Varlink's language against the types that are sent.
//!
//! Serde does not say what fields a type has. So a message is made from the description, and read as
//! the type: what is read has to be what was written, field by field.

use super::{DESCRIPTION, Error, INTERFACE, Method, SERVICE, SERVICE_DESCRIPTION, with_methods};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;
use std::fmt::Debug;
use zlink_idl::{CustomType, Field, Interface, Type};

/// The fields of one struct, as described.
type Fields<'a> = Vec<(String, &'a Type<'a>)>;

struct Description(Interface<'static>);

impl Description {
    fn of(interface: &str) -> Self {
        let text = match interface {
            INTERFACE => DESCRIPTION,
            SERVICE => SERVICE_DESCRIPTION,
            other => panic!("no description of {other}"),
        };
        Self(Interface::try_from(text).unwrap())
    }

    fn named(&self, name: &str) -> &CustomType<'static> {
        let found = self.0.custom_types().find(|known| *known.name() == name);
        found.unwrap_or_else(|| panic!("no type {name} is described"))
    }

    /// The variants, where it is an enum.
    fn variants(&self, of: &Type<'_>) -> Option<BTreeSet<String>> {
        match of {
            Type::Enum(list) => Some(list.iter().map(|known| known.name().to_string()).collect()),
            Type::Custom(name) => self
                .named(name.as_ref())
                .as_enum()
                .map(|known| known.variants().map(|variant| variant.name().to_string()).collect()),
            _ => None,
        }
    }

    /// A value of that type, every field of it there.
    fn sample(&self, of: &Type<'_>) -> Value {
        if let Some(variants) = self.variants(of) {
            return json!(variants.first());
        }
        match of {
            Type::Bool => json!(true),
            Type::Int => json!(1),
            Type::String => json!("text"),
            // The only objects without a type are devices.
            Type::ForeignObject => json!({ "bdf": "0000:65:00.0" }),
            Type::Optional(inner) => self.sample(inner),
            Type::Array(inner) => json!([self.sample(inner)]),
            Type::Custom(name) => {
                let object = self.named(name.as_ref()).as_object().unwrap();
                self.message(&fields(object.fields()))
            }
            other => panic!("{other} is not used here"),
        }
    }

    fn message(&self, fields: &Fields<'_>) -> Value {
        let sample = |(name, of): &(String, &Type<'_>)| (name.clone(), self.sample(of));
        Value::Object(fields.iter().map(sample).collect())
    }

    /// Compares one struct; `frame` makes a message of its fields.
    fn compare<T>(&self, what: &str, fields: &Fields<'_>, frame: impl Fn(Value) -> Value)
    where
        T: Serialize + DeserializeOwned + Debug,
    {
        let read = |message: Value| serde_json::from_value::<T>(frame(message));
        let whole = self.message(fields);
        let value = read(whole.clone()).unwrap_or_else(|error| panic!("{what}: {error}"));
        let written = serde_json::to_value(&value).unwrap();
        assert_eq!(written, frame(whole.clone()), "{what}: a field that is described is not sent");
        // Fields that may be missing show here alone.
        let described: BTreeSet<_> = fields.iter().map(|(name, _)| name.clone()).collect();
        assert_eq!(fields_of(&value), described, "{what}: fields of the type, and as described");

        for (name, of) in fields {
            let with = |value: Option<Value>| {
                let mut message: Map<String, Value> = whole.as_object().unwrap().clone();
                message.remove(name);
                message.extend(value.map(|value| (name.clone(), value)));
                read(Value::Object(message))
            };
            let what = format!("{what}: {name}");
            let optional = of.as_optional();
            // Whom a device waits for is read as the kernel where it says nothing that is known.
            let is_lenient = name == "until";
            let may_be_missing = optional.is_some() || is_lenient;
            assert_eq!(with(None).is_ok(), may_be_missing, "{what}: may it be missing?");
            let of = optional.map_or(*of, |inner| inner.inner());
            if let Some(variants) = self.variants(of).filter(|_| !is_lenient) {
                let error = with(Some(json!("no such"))).unwrap_err().to_string();
                assert_eq!(expected(&error), variants, "{what}: its variants");
            } else if !matches!(of, Type::ForeignObject) && !is_lenient {
                let right = self.sample(of);
                let others = [json!(true), json!(1), json!("text"), json!([]), json!({})];
                for other in others.into_iter().filter(|other| kind(other) != kind(&right)) {
                    assert!(with(Some(other.clone())).is_err(), "{what}: {other} is taken");
                }
            }
        }
    }
}

fn fields<'a>(described: impl Iterator<Item = &'a Field<'a>>) -> Fields<'a> {
    described.map(|field| (field.name().to_string(), field.ty())).collect()
}

/// The names of a struct's fields, of which `Debug` leaves none out.
fn fields_of(value: &impl Debug) -> BTreeSet<String> {
    let text = format!("{value:#?}");
    let fields = text.lines().filter_map(|line| line.strip_prefix("    "));
    let own = fields.filter(|line| !line.starts_with(' ')).filter_map(|line| line.split_once(": "));
    own.map(|(name, _)| name.to_owned()).collect()
}

/// What serde says that it knows, where it was given something else.
fn expected(error: &str) -> BTreeSet<String> {
    let (_, known) = error.split_once("expected").unwrap_or_else(|| panic!("{error}"));
    known.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

fn kind(value: &Value) -> std::mem::Discriminant<Value> {
    std::mem::discriminant(value)
}

fn names<T: ToString>(names: impl Iterator<Item = T>) -> BTreeSet<String> {
    names.map(|name| name.to_string()).collect()
}

#[test]
fn every_method_is_as_described() {
    let descriptions = [Description::of(INTERFACE), Description::of(SERVICE)];
    let described = descriptions.iter().flat_map(|description| {
        let interface = description.0.name();
        description.0.methods().map(move |method| format!("{interface}.{}", method.name()))
    });
    assert_eq!(names(described), names(super::Request::NAMES.iter()));
    macro_rules! compare {
        ($($interface:literal $method:ident -> $reply:ty: $($rule:ident)*;)*) => {$({
            let description = Description::of($interface);
            let name = stringify!($method);
            let mut methods = description.0.methods();
            let method = methods.find(|known| *known.name() == name).unwrap();
            let (inputs, outputs) = (fields(method.inputs()), fields(method.outputs()));
            description.compare::<super::$method>(name, &inputs, |message| message);
            let reply = format!("{name}'s reply");
            type Reply = <super::$method as Method>::Reply;
            description.compare::<Reply>(&reply, &outputs, |message| message);
        })*};
    }
    with_methods!(compare);
}

#[test]
fn every_type_is_as_described() {
    let description = Description::of(INTERFACE);
    let mut compared = BTreeSet::new();
    macro_rules! compare {
        ($($name:ident)*) => {$(
            let name = stringify!($name);
            let object = description.named(name).as_object().unwrap();
            description.compare::<super::$name>(name, &fields(object.fields()), |message| message);
            compared.insert(name.to_owned());
        )*};
    }
    compare!(Fd Holder Blocker Device Unproved Group Lease PolicyStatus KeptLease Keeper Left Revoked Revocation OpenFile Process Processes);
    // Enums are compared where they are used.
    let objects = description.0.custom_types().filter(|known| known.is_object());
    assert_eq!(names(objects.map(CustomType::name)), compared);
}

#[test]
fn every_error_is_as_described() {
    let description = Description::of(INTERFACE);
    let unknown = serde_json::from_value::<Error>(json!({ "error": "no such", "parameters": {} }));
    let mut known = expected(&unknown.unwrap_err().to_string());
    known.retain(|name| name.starts_with(INTERFACE));
    let described = description.0.errors().map(|error| format!("{INTERFACE}.{}", error.name()));
    assert_eq!(known, names(described));
    for error in description.0.errors() {
        let name = error.name().to_string();
        let frame = |parameters: Value| json!({ "error": format!("{INTERFACE}.{name}"), "parameters": parameters });
        // Advice stands beside the data of each; no type has it.
        let (advice, data): (Vec<_>, Vec<_>) =
            fields(error.fields()).into_iter().partition(|(name, _)| name == "advice");
        assert!(advice[0].1.as_optional().is_some(), "{name}: advice");
        description.compare::<Error>(&name, &data, frame);
    }
}
